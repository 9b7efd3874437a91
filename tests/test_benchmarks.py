"""The benchmark files run, every rival agrees with the reference at small shapes, and what is made of their numbers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from igpo.ops import OPS, BackendError

ROOT = Path(__file__).resolve().parents[1]


def case(name: str, **medians: float) -> dict:
    providers = {
        row.replace("_", "-"): {
            "median_ms": ms, "least_ms": ms, "p20_ms": ms, "p80_ms": ms, "host_ms": ms, "peak_mib": 1.0,
            "rate": 1.0, "of_best": 0.5, "ratio": 1.0,
        }
        for row, ms in medians.items()
    }  # fmt: skip
    op, rows, vocabulary = name.split()[0], *name.split()[1].split("x")
    axes = {"problem": name.split()[1], "variant": "", "rows": int(rows), "vocabulary": int(vocabulary)}  # fmt: skip
    return {
        "case": name, "op": op, "axes": axes, "providers": providers, "skipped": {"quack": "it is not installed"},
        "bytes": 10**6, "flops": 0, "bound": "copy", "best_ms": 0.5,
    }  # fmt: skip


def result(*cases: dict, gpu: str | None = "NVIDIA H200") -> dict:
    machine = {
        "gpu": gpu, "cpu": "Some CPU @ 2.50GHz", "isa": "avx512", "threads": 1,
        "date": "2026-12-01", "commit": "abc1234",
    }  # fmt: skip
    return {"machine": machine, "cases": list(cases), "failed": []}


def test_every_provider_passes_its_gate() -> None:
    command = [sys.executable, "-m", "pytest", "-c", "benchmarks/pytest.ini", "--rootdir", "benchmarks"]  # fmt: skip
    command += ["benchmarks", "--tiny", "--benchmark-disable"]
    # the Triton rows have tests of their own, and would take minutes in the interpreter
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout or "100%" in done.stdout


def test_a_wrong_rival_is_named_and_not_timed_but_our_own_code_may_not_be_wrong(bench) -> None:
    harness, timing = bench("harness"), bench("timing")

    def refusing() -> None:
        raise BackendError("it takes no such thing")

    def made(**results) -> object:
        runs = {k.replace("_", "-"): timing.Run(v) for k, v in results.items()}
        gate = lambda x: harness.close(x, torch.ones(2), rtol=0, atol=0)  # noqa: E731
        return harness.Case("op", {"problem": "p", "variant": ""}, runs, gate, 1, "")

    def full() -> None:
        raise torch.OutOfMemoryError("no room")

    one, zero = lambda: torch.ones(2), lambda: torch.zeros(2)
    passed, skipped = harness.gated(made(igpo=one, igpo_cuda=refusing, quack=zero, liger=lambda: 1 / 0))  # fmt: skip
    assert set(passed) == {"igpo"}
    assert skipped["igpo-cuda"] == "it takes no such thing"
    assert skipped["quack"].startswith("wrong: AssertionError: result 0")
    assert skipped["liger"].startswith("failed: ZeroDivisionError")
    assert harness.gated(made(igpo=one, research=full))[1]["research"].endswith("no room")
    with pytest.raises(torch.OutOfMemoryError):
        harness.gated(made(igpo=full))
    for name in ("igpo", "eager"):
        with pytest.raises(AssertionError, match="result 0"):
            harness.gated(made(**{"igpo": one, name: zero}))


def test_providers_take_turns(bench) -> None:
    timing, order = bench("timing"), []
    runs = {
        name: timing.Run(lambda made, name=name: order.append(name), lambda: 0) for name in "abc"
    }
    times = timing.interleaved(runs, "cpu", 1e-9)
    assert {t.rounds for t in times.values()} == {3}
    assert order == [
        *"abc",
        *"abc",
        *"bca",
        *"cab",
    ]  # once to know how long each takes, then in turn


def test_gpu_timing_flushes_for_as_long_as_the_host_needs(bench, monkeypatch) -> None:
    timing, flushed = bench("timing"), []

    class Flush:
        seconds = 1e-4

        def __call__(self, times: int) -> None:
            flushed.append(times)

    monkeypatch.setattr(timing, "L2Flush", Flush)
    monkeypatch.setattr(timing, "wall", lambda run, device: 4e-4)
    monkeypatch.setattr(timing, "event_seconds", lambda call: call() or 2e-6)
    calls: list[str] = []
    runs = {name: timing.Run(lambda name=name: calls.append(name)) for name in "ab"}
    times = timing.interleaved(runs, "cuda", 0.02)
    assert set(flushed) == {1 + int(1.5 * 4e-4 / 1e-4)}
    assert len(flushed) == len(calls) == 2 * times["a"].rounds
    assert times["a"].median == 2e-6
    assert times["a"].host == 4e-4


def test_quantiles_are_by_nearest_rank(bench) -> None:
    found = bench("timing").summary([5.0, 1.0, 3.0, 2.0, 4.0], host=9.0)
    assert (found.least, found.p20, found.median, found.p80) == (1.0, 2.0, 3.0, 5.0)


def test_every_rival_is_there_or_says_why_not(bench) -> None:
    peers = bench("peers")
    for kind, members in peers.KINDS.items():
        found, skipped = peers.find(kind, "cuda")
        assert set(found) | set(skipped) == set(members)
        assert all(callable(f) for f in found.values())
        without_gpu = peers.find(kind, "cpu")[1].values()
        assert all(re.search("not installed|needs a GPU|and later", why) for why in without_gpu)


def test_a_gpu_is_asked_for_the_shapes_of_8b_models(bench) -> None:
    shapes = bench("shapes")
    rows = shapes.rows(64, "full", "cuda")
    assert {r.rows for r in rows if r.vocabulary == 126464} == {32, 64, 128, 256, 512, 1024, 4096}
    assert {(h.rows, h.trained, h.ignored) for h in shapes.heads("quick", "cuda")} == {
        (4096, False, 0.0), (4096, True, 0.0), (4096, True, 0.5)
    }  # fmt: skip
    assert {r.rows for r in shapes.rows(64, "full", "cpu")} == {64}


def test_ops_on_logits_run_alone_the_others_together(bench) -> None:
    run = bench("run")
    assert sorted(run.OPS) == sorted(OPS)
    assert run.groups(["policy_loss", "merge_hints", "token_logprob"]) == [
        ["token_logprob"], ["merge_hints", "policy_loss"]
    ]  # fmt: skip
    assert sorted(op for group in run.groups(run.OPS) for op in group) == sorted(OPS)


def test_what_was_measured_is_written_before_the_end(bench, tmp_path: Path, monkeypatch) -> None:
    run, output = bench("run"), tmp_path / "out" / "r.json"

    def interrupted(ops: list[str], options: list[str], raw: Path, threads: int) -> int:
        if ops == ["token_logprob"]:
            raise KeyboardInterrupt
        entry = {"group": "a", "stats": {"median": 0.002}, "extra_info": case("op 8x16", igpo=2, eager=4)}  # fmt: skip
        raw.write_text(json.dumps({"benchmarks": [entry, entry | {"extra_info": {}}]}))
        return 0

    monkeypatch.setattr(run, "run_pytest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.benchmark(["unmask_step", "token_logprob"], [], output=output)
    (found,) = json.loads(output.read_text())["cases"]
    assert found["providers"]["eager"]["ratio"] == 2.0
    assert found["providers"]["igpo"]["rate"] == 1e6 / 2 / 1e6
    assert found["end_to_end_ms"] == 2.0


# --- compare ---


def test_only_what_fell_by_more_than_the_margin_is_worse(bench) -> None:
    compare = bench("compare")

    def found(ours: float, first: float, second: float) -> dict:
        cases = case("op 8x16", igpo=ours, eager=first), case("op 9x16", igpo=ours, eager=second)
        return compare.speedups(result(*cases))

    before = found(1, 10, 4)
    assert before == {"op 8x16": {"igpo": 10.0}, "op 9x16": {"igpo": 4.0}}
    assert not compare.worse(before, found(3, 30, 12), 0.1)  # a slower machine
    fell = found(1, 8.9, 3.7)
    assert compare.worse(before, fell, 0.1) == {
        ("op 8x16", "igpo"): "8.90x eager, was 10.00x (margin 10%)"
    }
    assert not compare.worse(before, fell, 0.2)


def test_what_is_no_longer_measured_is_worse(bench) -> None:
    compare = bench("compare")
    before = compare.speedups(result(case("op 8x16", igpo=1, igpo_cuda=1, eager=10)))
    now = compare.speedups(result(case("op 8x16", igpo=1, eager=10)))
    assert compare.worse(before, now, 0.1) == {("op 8x16", "igpo-cuda"): "no longer measured"}
    assert compare.worse(before, {}, 0.1).keys() == {("op 8x16", "igpo"), ("op 8x16", "igpo-cuda")}


def run_compare(bench, monkeypatch, tmp_path: Path, baseline: dict, now: list[dict]) -> int:
    """compare.py of op "op", the benchmarks replaced by made-up results, one per run."""
    compare = bench("compare")
    monkeypatch.setattr(compare, "BASELINES", tmp_path)
    compare.save(tmp_path / "nvidia-h200.json", baseline, ["op"])
    monkeypatch.setattr(compare, "benchmark", lambda ops: now.pop(0))
    monkeypatch.setattr(sys, "argv", ["compare.py", "op"])
    return compare.main()


def test_compare_fails_when_worse_twice_and_not_when_worse_once(bench, monkeypatch, tmp_path) -> None:  # fmt: skip
    good, bad = (result(case("op 8x16", igpo=ms, eager=10)) for ms in (1, 2))
    assert run_compare(bench, monkeypatch, tmp_path, good, [good]) == 0
    assert run_compare(bench, monkeypatch, tmp_path, good, [bad, good]) == 0
    assert run_compare(bench, monkeypatch, tmp_path, good, [bad, bad]) == 1
    broken = good | {"failed": ["op"]}
    assert run_compare(bench, monkeypatch, tmp_path, good, [broken]) == 1


def test_saving_keeps_the_other_ops(bench, tmp_path: Path) -> None:
    compare, path = bench("compare"), tmp_path / "x.json"
    compare.save(path, result(case("a 1x2", igpo=1, eager=2), case("b 1x2", igpo=1, eager=2)), ["a", "b"])  # fmt: skip
    compare.save(path, result(case("b 1x3", igpo=1, eager=3)), ["b"])
    assert json.loads(path.read_text())["speedups"] == {"a 1x2": {"igpo": 2.0}, "b 1x3": {"igpo": 3.0}}  # fmt: skip


def test_baselines_belong_to_a_kind_of_machine(bench) -> None:
    report = bench("report")
    assert report.kind(result()["machine"]) == "nvidia-h200"
    assert report.kind(result(gpu=None)["machine"]) == "some-cpu-2.50ghz-avx512-1-threads"
    for path in (ROOT / "benchmarks" / "baselines").glob("*.json"):
        saved = json.loads(path.read_text())
        assert path.stem == report.kind(saved["machine"])
        assert {name.split()[0] for name in saved["speedups"]} == set(OPS)
        if not saved["machine"]["gpu"]:
            page = (ROOT / "docs" / "performance.md").read_text()
            assert bench("compare").markdown(saved["speedups"]) in page, path.name


# --- plot, table ---


def test_plots_show_what_was_measured_at_two_sizes(bench, tmp_path: Path, monkeypatch) -> None:
    plot = bench("plot")
    cases = [case(f"op {n}x{v}", igpo=n * v, eager=2 * n * v) for n, v in [(8, 16), (32, 16), (8, 64)]]  # fmt: skip
    assert plot.lines(cases, "rows", "median_ms")["igpo"] == [(8, 128), (32, 512)]
    assert plot.lines(cases, "vocabulary", "median_ms")["eager"] == [(16, 256), (64, 1024)]
    assert plot.title("op", result()["machine"]) == "op\nNVIDIA H200, 2026-12-01, abc1234"
    source = tmp_path / "r.json"
    source.write_text(json.dumps(result(*cases)))
    monkeypatch.setattr(sys, "argv", ["plot.py", str(source), "--out", str(tmp_path)])
    assert plot.main() == 0
    (png,) = tmp_path.glob("*.png")
    assert png.name == "bench-nvidia-h200-op.png"
    assert png.read_bytes()[:4] == b"\x89PNG"
    source.write_text(json.dumps(result(cases[0])))
    assert plot.main() == 1


def test_the_table_names_what_was_not_timed(bench) -> None:
    text = bench("report").table([case("op 8x16", igpo=1.0, eager=2.0)])
    assert "op 8x16: 1.00 MB, 0.00 GFLOP; at best 0.5 ms" in text
    assert "quack          not timed: it is not installed" in text


def test_the_markdown_table_has_a_line_per_case(bench) -> None:
    cases = case("op 8x16", igpo=1, eager=2), case("op 9x16", igpo=2, quack=1)
    text = bench("report").markdown(result(*cases))
    assert text.splitlines()[2:] == [
        "| `op` 8x16 | 1 | 2.00x |  | 1.0 |",
        "| `op` 9x16 | 2 |  | 0.50x | 1.0 |",
    ]


# --- targets ---


def test_targets_ask_for_cases_that_the_benchmarks_have(bench) -> None:
    targets, shapes, asked = bench("targets"), bench("shapes"), set()

    class Cases(dict):
        def get(self, name: str, default=None):
            asked.add(name)
            return default

    assert {t.value(Cases()) for t in targets.targets()} == {None}
    variants = {
        "token_logprob": ("forward", "backward", "forward+backward"),
        "masked_cross_entropy": ("scored=100%", "scored=50%"),
        "unmask_step": ("T=0 masked=100%", "T=1.2 masked=100%", "T=0 masked=25%"),
    }
    rows, heads = shapes.rows(64, "full", "cuda"), shapes.heads("quick", "cuda")
    there = {f"{op} {r} {v}" for op, every in variants.items() for v in every for r in rows}
    there |= {f"linear_masked_cross_entropy {h}" for h in heads}
    there |= {f"policy_loss {b}x{n} forward+backward" for b, n in shapes.canvases("quick")}
    at = shapes.generations("quick", "cuda")[0]
    there.add(f"rollout {at} T=1.2 block={at.block} steps={at.steps}")
    for size in ("quick", "full"):
        there |= {f"train_step {b} inner={b.inner} one mask" for b in shapes.training(size, "cuda")}
    assert asked <= there


def test_targets_are_computed_from_the_fastest_of_our_rows(bench) -> None:
    targets = bench("targets")
    names = [f"unmask_step {n}x126464 bfloat16 T=0 masked=100%" for n in (32, 256)]
    made = {name: {"providers": {"igpo": {"median_ms": 0.05, "of_best": 0.2},
                                 "igpo-cuda": {"median_ms": 0.007, "of_best": 0.8},
                                 "eager": {"median_ms": 0.001, "of_best": 2.0}}} for name in names}  # fmt: skip
    text = targets.table(made)
    assert "| unmask_step in all, 32 rows | <= 8 us | 7 us | yes |" in text
    assert "| unmask_step, T = 0, 256 rows and more | >= 90 % of copy | 80 % of copy | no |" in text
    assert "| policy_loss, 64 x 256 | <= 10 us | not yet measured |  |" in text


def test_the_page_lists_every_target(bench) -> None:
    targets = bench("targets")
    page = targets.PAGE.read_text()
    for target in (*targets.targets(), *targets.cpu_targets()):
        assert f"| {target.what} |" in page, "run benchmarks/targets.py --write"
    marks = (targets.BEGIN, targets.END, targets.CPU_BEGIN, targets.CPU_END)
    assert [page.count(mark) for mark in marks] == [1] * 4
