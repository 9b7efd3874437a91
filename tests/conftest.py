"""Fixtures every test can use. Backends are fixtures, not loops: each shows up in a test's id."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from igpo.ops import OPS, _native, use_backend

SHARED = Path(os.environ.get("IGPO_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shared() -> Path:
    """Real data and parity fixtures beside the project; they are not part of it."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}")
    return SHARED


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per backend, forced."""
    if request.param == "cpu" and _native.why_not():
        pytest.fail(f"the CPU kernels cannot be tested: {_native.why_not()}")
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set this processor has, on the cpu backend."""
    native = _native.module()
    before = native.isa()
    try:
        native.set_isa(request.param)
    except ValueError as reason:
        pytest.skip(str(reason))
    with use_backend("cpu"):
        yield request.param
    native.set_isa(before)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def ran():
    """ran("merge_hints") -> the backend the op's last call really used."""
    return lambda op: OPS[op].chosen[0]
