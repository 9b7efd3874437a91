"""The demo's arms over several seeds: the numbers of docs/learning.md.

    python -m igpo.demo.study [NUM_SEEDS] [FOLDER]        5 seeds into docs/; goes on where it stopped

FOLDER gets learning.jsonl (one finished run a line), learning.json (means and intervals) and learning.png.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from igpo.environment import git_commit, machine, versions
from igpo.logging import output, progress, say

from . import warm_start
from .arm import hint_lift, measure, run_arm
from .plots import LABELS, plot_study
from .recipe import NUM_STEPS, STUDY_ARMS, arm_config
from .results import over_steps

# two-sided 95 % quantiles of Student's t, by degrees of freedom
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with the half width of its 95 % interval (Student's t)."""

    value: float
    half_width: float
    per_seed: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.half_width:.3f}"


def mean(values: Sequence[float]) -> Mean:
    """At least two and at most ten values."""
    n, middle = len(values), sum(values) / len(values)
    spread = math.sqrt(sum((v - middle) ** 2 for v in values) / (n - 1))
    return Mean(middle, T95[n - 1] * spread / math.sqrt(n), tuple(values))


def run(num_seeds: int, folder: Path, num_steps: int = NUM_STEPS) -> dict[str, Any]:
    """Runs what learning.jsonl does not have yet, then writes the summary. Returns it."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "learning.jsonl"
    start = warm_start.shipped()
    before = measure(start, arm_config("igpo", 0))
    wanted = [(arm, seed) for seed in range(num_seeds) for arm in STUDY_ARMS]
    done = {(line["name"], line["seed"]) for line in read(path)}
    with progress(len(wanted), "study") as advance, tempfile.TemporaryDirectory() as scratch:
        for arm, seed in wanted:
            if (arm, seed) not in done:
                cfg = arm_config(arm, seed, num_steps)
                found = run_arm(arm, cfg, start, before, Path(scratch) / str(seed))
                with path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"seed": seed, **found.summary()}) + "\n")
            advance()
    lines = [line for line in read(path) if line["seed"] < num_seeds]
    lift = hint_lift(start, arm_config("igpo", 0))
    summary = {
        "before": {"accuracy": before.accuracy, "all_wrong": before.all_wrong},
        "hint_lift": {"plain": lift.plain, "hinted": lift.hinted},
        "arms": {arm: summarise([x for x in lines if x["name"] == arm]) for arm in STUDY_ARMS},
        "seeds": num_seeds,
        "steps": num_steps,
        "date": time.strftime("%Y-%m-%d"),
        "git_commit": git_commit(),
        "machine": machine(),
        "versions": versions(),
    }
    (folder / "learning.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    plot_study(summary["arms"], folder / "learning.png", num_seeds)
    return summary


def read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


MEASURES = ("after", "all_wrong_after", "rollouts", "forwards", "seconds")
FRACTIONS = ("all_wrong", "unrescued")  # of the groups of a step, before and after any rescue


def summarise(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds of one arm: its measures, and against rollouts and forwards its held-out accuracy and the
    all-wrong fractions (of the steps since the point before)."""
    found: dict[str, Any] = {name: vars(mean([x[name] for x in lines])) for name in MEASURES}
    for name in FRACTIONS:
        found[name] = vars(mean([over_steps([p[name] for p in x["points"]]) for x in lines]))
    places = [i for i, p in enumerate(lines[0]["points"]) if p["accuracy"] is not None]
    measured = [[x["points"][i] for i in places] for x in lines]
    found["curve"] = [
        {
            "step": points[0]["step"],
            "rollouts": sum(p["rollouts"] for p in points) / len(points),
            "forwards": sum(p["forwards"] for p in points) / len(points),
            "accuracy": vars(mean([p["accuracy"] for p in points])),
            **{name: _since(lines, name, before, place) for name in FRACTIONS if place},
        }
        for before, place, points in zip(
            [0, *places], places, zip(*measured, strict=True), strict=False
        )
    ]
    return found


def _since(lines: Sequence[dict[str, Any]], name: str, before: int, place: int) -> dict[str, Any]:
    """The mean over seeds of a fraction's mean over the points after `before`, up to `place`."""
    return vars(
        mean(
            [
                sum(p[name] for p in x["points"][before + 1 : place + 1]) / (place - before)
                for x in lines
            ]
        )
    )


def table(summary: dict[str, Any]) -> str:
    """The table of docs/learning.md."""
    heads = (
        "arm",
        "accuracy after",
        "all-wrong groups in training",
        "after rescue",
        "held-out groups all wrong",
    )
    lines = [f"| {' | '.join((*heads, 'rollouts', 'forwards'))} |", "|---|---|---|---|---|---|---|"]
    for arm, found in summary["arms"].items():
        shown = [
            Mean(**found[key]) for key in ("after", "all_wrong", "unrescued", "all_wrong_after")
        ]
        counts = [f"{found[key]['value']:,.0f}" for key in ("rollouts", "forwards")]
        lines.append(f"| {LABELS[arm]} | " + " | ".join([*map(str, shown), *counts]) + " |")
    return "\n".join(lines)


def main() -> None:
    words = sys.argv[1:]
    summary = run(int(words[0]) if words else 5, Path(words[1]) if len(words) > 1 else Path("docs"))
    output.print(table(summary), markup=False, soft_wrap=True)
    say("written: learning.json, learning.jsonl, learning.png")


if __name__ == "__main__":
    main()
