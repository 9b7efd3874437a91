"""Which row `auto` takes on a GPU, from records of checks. No GPU is needed: the class of the device is passed in."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from igpo.ops import OPS, BackendError, _checked, use_backend
from igpo.ops.__main__ import rows
from igpo.ops._dispatch import Backend, Op, reference

GPU = torch.device("cuda", 0)


def record(backend: str, device_class: str = "sm_90", **median_ms: float) -> _checked.Record:
    return _checked.Record(
        "toy", backend, device_class, "NVIDIA H200", "580.1", "2026-12-01", "abc1234", "2.11.0", "3.6.0",
        tests_passed=3, sanitizer={}, median_ms=median_ms,
    )  # fmt: skip


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch):
    """toy(records, device_class) -> an op with rows cuda, triton, reference on a GPU of that class."""

    def make(known: list[_checked.Record], device_class: str = "sm_90", refuses=None) -> Op:
        monkeypatch.setattr(_checked, "records", lambda: tuple(known))
        monkeypatch.setattr(_checked, "device_class", lambda device: device_class)
        gpu = [
            Backend(
                name,
                {"forward": lambda name=name: name},
                ("cuda",),
                "",
                refuses=lambda name=name: (refuses or {}).get(name),
            )
            for name in ("cuda", "triton")
        ]
        monkeypatch.setitem(
            OPS, "toy", None
        )  # Op() lists itself; taken off the list after the test
        return Op("toy", (*gpu, reference(forward=lambda: "reference")))

    return make


def test_the_shipped_file_is_readable_and_speaks_of_ops_that_exist() -> None:
    for found in _checked.records():
        assert found.op in OPS
        assert found.backend in {row.name for row in OPS[found.op].backends}
        assert found.tests_passed > 0


def test_auto_never_takes_an_unchecked_row(toy) -> None:
    assert toy([])("forward", GPU) == "reference"


def test_auto_takes_a_checked_row_though_another_is_listed_before_it(toy) -> None:
    assert toy([record("triton")])("forward", GPU) == "triton"


def test_a_check_on_another_class_of_device_does_not_count(toy) -> None:
    assert toy([record("cuda", "sm_80")], "sm_90")("forward", GPU) == "reference"


def test_auto_takes_the_measured_fastest(toy) -> None:
    slow, fast = {"a": 2.0, "b": 3.0}, {"a": 2.5, "b": 1.0}
    assert toy([record("cuda", **slow), record("triton", **fast)])("forward", GPU) == "triton"
    assert toy([record("cuda", **fast), record("triton", **slow)])("forward", GPU) == "cuda"


def test_speed_is_compared_on_common_cases_only() -> None:
    known = [record("cuda", a=2.0), record("triton", a=1.0, huge=1e6)]
    assert _checked.fastest_first("toy", "sm_90", known) == ["triton", "cuda"]


def test_the_next_one_runs_when_the_fastest_refuses(toy) -> None:
    known = [record("cuda", a=1.0), record("triton", a=2.0)]
    op = toy(known, refuses={"cuda": "it takes no such thing"})
    assert op("forward", GPU) == "triton"
    op = toy(known, refuses={"cuda": "no", "triton": "no"})
    assert op("forward", GPU) == "reference"


def test_a_forced_row_runs_unchecked_or_says_why_not(toy) -> None:
    op = toy([])
    with use_backend("cuda"):
        assert op("forward", GPU) == "cuda"
    op = toy([record("cuda")], refuses={"cuda": "it takes no such thing"})
    with use_backend("cuda"), pytest.raises(BackendError, match="it takes no such thing"):
        op("forward", GPU)


def test_the_device_is_asked_once(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    op, asked = toy([record("cuda")]), []
    monkeypatch.setattr(_checked, "device_class", lambda device: asked.append(device) or "sm_90")
    for _ in range(3):
        op("forward", GPU)
    op("forward", torch.device("cuda", 1))
    assert asked == [GPU, torch.device("cuda", 1)]


def test_the_cpu_reads_no_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checked, "records", lambda: pytest.fail("the file was read"))
    op = OPS["merge_hints"]
    op.ranked.clear()
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    op("forward", tokens.device, tokens, tokens, tokens == 0, 5)
    assert op.chosen == ["cpu"]


def test_the_table_says_where_a_row_was_checked(toy) -> None:
    op = toy([record("cuda"), record("cuda", "sm_100")])
    shown = {backend: checked for _, backend, _, checked in rows(op)}
    assert shown["cuda"] == (
        "NVIDIA H200 (sm_100), 2026-12-01, abc1234; NVIDIA H200 (sm_90), 2026-12-01, abc1234"
    )
    assert shown["triton"] == "never run on a GPU"
    assert shown["reference"] == "definition"


def test_files_of_another_format_are_refused() -> None:
    assert _checked.parse(
        json.dumps({"format": 1, "records": [asdict(record("cuda", a=1.0))]})
    ) == (record("cuda", a=1.0),)
    with pytest.raises(ValueError, match="format must be 1, got 2"):
        _checked.parse(json.dumps({"format": 2, "records": []}))
