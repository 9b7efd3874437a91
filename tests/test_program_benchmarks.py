"""The benchmarks of whole programs: their plain forms are right, and what is made of their numbers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from igpo import time_plan

ROOT = Path(__file__).resolve().parents[1]
RESULTS = [
    path
    for name in ("rollout", "train_step")
    for path in sorted((ROOT / "benchmarks" / "results").glob(f"*-{name}.json"))[-1:]
]


def test_the_model_of_a_gpu_is_never_made_on_a_cpu(bench) -> None:
    shapes, decoders = bench("shapes"), bench("decoders")
    assert shapes.geometry("full", "cuda") == shapes.geometry("quick", "cuda") == shapes.LLADA_8B
    assert shapes.geometry("full", "cpu") == shapes.SIXTEENTH
    with pytest.raises(ValueError, match="must be on a GPU, got cpu"):
        decoders.decoder(shapes.LLADA_8B, "cpu")
    small, large = shapes.SIXTEENTH, shapes.LLADA_8B
    assert (large.width, large.heads) == (16 * small.width, 16 * small.heads)
    assert (large.layers, large.vocabulary) == (small.layers, small.vocabulary)
    assert [at.batch for at in shapes.generations("full", "cuda")] == [8, 16, 32, 64]
    (batch,) = shapes.training("full", "cuda")
    assert (batch.sequences, batch.prompt + batch.completion, batch.inner) == (64, 456, 4)


def test_the_research_form_draws_from_the_same_law(bench) -> None:
    """Which of two positions is committed first, and with which token, in both forms: a two-sample chi-square test."""
    shapes, decoders, rollout = bench("shapes"), bench("decoders"), bench("bench_rollout")
    research, rows = bench("research"), 3000
    tiny = replace(shapes.TOY, width=16, intermediate=16, heads=1, vocabulary=9)
    at = shapes.Generation(tiny, rows, 3, 2, 2, 2, 0, rows)
    model = decoders.decoder(tiny)
    one = decoders.canvases(tiny, 1, at.prompt, at.completion)
    canvas = replace(
        decoders.canvases(tiny, rows, at.prompt, at.completion), tokens=one.tokens.repeat(rows, 1)
    )

    def counts(tokens: torch.Tensor) -> torch.Tensor:
        made = tokens[:, at.prompt :]
        place = (made != canvas.mask_id).long()
        assert place.sum(1).eq(1).all()
        column = place.argmax(1)
        word = made.gather(1, column[:, None])[:, 0]
        return torch.bincount(column * tiny.vocabulary + word, minlength=2 * tiny.vocabulary)

    state = model.hidden(one.tokens)[0, -2:].mean(0)
    model.head_weight[canvas.mask_id] = -40 * state / state.square().sum()  # never drawn
    theirs = counts(research.denoise(model, canvas, group=rows, **rollout.options(at, 1.2, 1)))
    mine = counts(rollout.ours(model, canvas, at, 1.2, 1))
    often = mine + theirs >= 20
    mine, theirs = mine[often].double(), theirs[often].double()
    assert mine.sum() > 0.97 * rows
    statistic, degrees = ((mine - theirs) ** 2 / (mine + theirs)).sum(), len(mine) - 1
    assert degrees >= 6
    assert statistic < degrees + 3.3 * (2 * degrees) ** 0.5 + 4  # p below 1e-3


def test_calls_of_seconds_take_turns_and_are_not_grouped(bench) -> None:
    timing, order = bench("timing"), []
    runs = {name: timing.Run(lambda name=name: order.append(name)) for name in "ab"}
    times = timing.in_turn(runs, "cpu", 2)
    assert order == ["a", "b", "b", "a"]
    assert {t.rounds for t in times.values()} == {2}


def program(op: str, problem: str, variant: str, **medians: float) -> dict:
    providers = {
        name.replace("_", "-"): {
            "median_ms": ms, "least_ms": ms, "p20_ms": ms, "p80_ms": ms, "host_ms": ms, "peak_mib": 1024.0,
            "tokens_per_s": 2e3 / ms, "subset": "1 of 8", "units": 2, "rate": 3.0 / ms, "of_best": 0.5, "ratio": 1.0,
        }
        for name, ms in medians.items()
    }  # fmt: skip
    return {
        "case": f"{op} {problem} {variant}", "op": op, "axes": {"problem": problem, "variant": variant},
        "unit": "sequence", "providers": providers, "skipped": {}, "held_mib": 2048.0, "bytes": 0, "flops": 10**9,
        "best_ms": 1.0, "bound": "matmul",
    }  # fmt: skip


H200_ROLLOUT = "8x200+256 32x4096x126464 bfloat16", "T=1.2 block=32 steps=128"
H200_TRAINING = "64x200+256 32x4096x126464 bfloat16", "inner=4 one mask"


def test_targets_of_programs(bench) -> None:
    targets = bench("targets")
    rollout = program("rollout", *H200_ROLLOUT, igpo=10, research=13, stage_forward=9.9, dual_cache=2)  # fmt: skip
    training = program("train_step", *H200_TRAINING, igpo=10, research=16)
    cases = {case["case"]: case for case in (rollout, training)}
    text = targets.table(cases, targets.program_targets())
    assert [line.split("|")[3].strip() for line in text.splitlines()[2:]] == [
        "1.01", "1.3", "6.5", "1.6", "3 GiB",
    ]  # fmt: skip
    fewer = H200_TRAINING[0].replace("64x", "16x", 1)
    quick = program("train_step", fewer, H200_TRAINING[1], igpo=1, research=3)
    text = targets.table({quick["case"]: quick}, targets.program_targets())
    assert "| >= 1.5 | 3 | yes |" in text
    small = program("rollout", "8x200+256 32x256x126464 float32", H200_ROLLOUT[1], igpo=1, research=2)  # fmt: skip
    assert "| >= 3 | 2 | no |" in targets.table({small["case"]: small}, targets.cpu_targets())


def test_the_table_of_a_program_shows_the_stages_and_what_they_leave(bench) -> None:
    case = program("rollout", *H200_ROLLOUT, igpo=10, research=20, stage_forward=8, stage_head=1)
    lines = bench("report").programs({"cases": [case]}).splitlines()
    assert "| research | 20 | 100 | 0.15 | 1,024 | 2.00 | 1 of 8 |" in lines
    assert "| of ours: forward | 8 | | | | 0.800 | 1 of 8 |" in lines
    assert "| of ours: the rest | 1 | | | | 0.100 | |" in lines


def test_rates_are_recorded_for_the_place_they_were_measured_in(tmp_path: Path, monkeypatch) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import record_rates

    where = {"gpu": "NVIDIA H200", "cpu": "c", "threads": 8, "date": "2026-12-01", "commit": "abc"}
    case = program("rollout", *H200_ROLLOUT, igpo=10)
    source, target = tmp_path / "r.json", tmp_path / "measured.json"
    source.write_text(json.dumps({"machine": where, "cases": [case, {"case": "op", "op": "op"}]}))
    target.write_text(json.dumps({"format": 1, "rates": []}))
    monkeypatch.setattr(sys, "argv", ["record_rates.py", str(source), "--into", str(target)])
    for _ in range(2):
        assert record_rates.main() == 0
    (found,) = time_plan.read(target.read_text())
    assert found == time_plan.Rate(
        "rollout", "NVIDIA H200", None, "bfloat16", "32x4096x126464", 0.3, "2026-12-01", "abc"
    )


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_page_and_the_dry_run_have_the_newest_numbers(bench, path: Path) -> None:
    result = json.loads(path.read_text())
    page = (ROOT / "docs" / "performance.md").read_text()
    assert bench("report").programs(result) in page
    where = (path.stem.rpartition("-")[2], result["machine"]["commit"])
    (rate,) = [rate for rate in time_plan.measured() if (rate.benchmark, rate.commit) == where]
    (case,) = result["cases"]
    assert rate.tflop_per_s == round(case["providers"]["igpo"]["rate"], 6)
