from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from harness import DTYPES, TINY_VOCABULARY, VOCABULARIES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tiny",
        action="store_true",
        help="small shapes: every correctness gate runs, timings mean nothing",
    )


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(params=VOCABULARIES)
def vocabulary(request: pytest.FixtureRequest) -> int:
    if request.config.getoption("--tiny"):
        if request.param != "small":
            pytest.skip("--tiny: one vocabulary is enough")
        return TINY_VOCABULARY
    return VOCABULARIES[request.param]
