from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import shapes

START = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("igpo")
    group.addoption(
        "--tiny",
        action="store_true",
        help="small shapes: every correctness gate runs, timings mean nothing",
    )
    group.addoption("--quick", action="store_true", help="a few problems of each op")
    group.addoption(
        "--providers", default="", help="comma-separated: these and our own rows, not every rival"
    )
    group.addoption(
        "--budget", type=float, default=0, help="seconds after which no further case is begun"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    size = "tiny" if options.tiny else "quick" if options.quick else "full"
    if "rows" in metafunc.fixturenames:
        found = shapes.rows(metafunc.module.CPU_ROWS, size)
        metafunc.parametrize("rows", found, ids=[str(x).replace(" ", "-") for x in found])
    if "head" in metafunc.fixturenames:
        found = shapes.heads(size)
        metafunc.parametrize("head", found, ids=[str(x).replace(" ", "-") for x in found])
    if "canvas" in metafunc.fixturenames:
        found = shapes.canvases(size)
        metafunc.parametrize("canvas", found, ids=[f"{b}x{n}" for b, n in found])
    for name, of in (("generation", shapes.generations), ("training", shapes.training)):
        if name in metafunc.fixturenames:
            found = of(size)
            metafunc.parametrize(name, found, ids=[str(x).replace(" ", "-") for x in found])

    if "variant" in metafunc.fixturenames and "training" in metafunc.fixturenames:
        every = list(metafunc.module.VARIANTS)
        one = size == "quick" or (size == "full" and shapes.DEVICE == "cpu")
        metafunc.parametrize("variant", every[:1] if one else every)


def pytest_runtest_setup(item: pytest.Item) -> None:
    budget = item.config.option.budget
    if budget and time.monotonic() - START > budget:
        pytest.skip(f"the time of {budget:g} s is spent")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
