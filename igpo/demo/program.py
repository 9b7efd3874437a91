"""`igpo demo`: the hint lift, the arms, the table, and the files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from igpo.environment import report as environment
from igpo.logging import duration, output, progress, say, shown_below
from igpo.models import MaskedDecoder
from igpo.options import DemoOptions
from igpo.types import Graded, Metrics, Seed

from . import warm_start
from .arm import LIFT_PROBLEMS, Held, Lift, frame, hint_lift, measure, run_arm
from .plots import COLOURS, LABELS, plot
from .recipe import ARMS, CHAIN, NUM_EVAL, NUM_STEPS, arm_config
from .report import write_report
from .results import ArmResult, Frame

TITLE = "GRPO and IGPO on a chain of modular arithmetic"
NOTES = (
    "A masked-diffusion model of 121 thousand parameters writes the states of x <- (x op d) mod 97 over 10 steps. "
    "Every arm starts from the same weights and sees the same problems; the verifier wants every state right.",
    "The likelihood is the replay of the step map: every token is scored on the canvas it was written on; rows with "
    "hints are scored left to right.",
    "A toy is no evidence about models of 8 billion parameters: it shows the mechanism.",
)
STEPS_PER_SECOND = 4  # of the answer shown while training
LIFT_OF_NOTE = 1.2  # below it hints do nothing worth speaking of (chosen)


def run(
    options: DemoOptions, num_steps: int = NUM_STEPS, num_problems: int = NUM_EVAL
) -> dict[str, object]:
    """Runs everything; returns what summary.json holds."""
    began, out = time.monotonic(), Path(options.out)
    torch.set_num_threads(1)  # of matrices this small, more threads only wait for each other
    out.mkdir(parents=True, exist_ok=True)
    _introduce()
    start = warm_start.train() if options.from_scratch else warm_start.shipped()
    cfg = arm_config("igpo", options.seed, num_steps)
    before = measure(start, cfg, num_problems)
    lift = hint_lift(start, cfg, min(LIFT_PROBLEMS, num_problems))
    say(describe(lift))
    arms = run_arms(start, before, options, num_steps, num_problems)
    output.print(table(arms))
    say(NOTES[-1])
    summary = {
        "arms": {arm.name: arm.summary() for arm in arms},
        "hint_lift": {"plain": lift.plain, "hinted": lift.hinted, "ratio": lift.ratio},
        "seed": options.seed,
        "from_scratch": options.from_scratch,
        "seconds": round(time.monotonic() - began, 1),
        "environment": environment(),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    plot(arms, out / "learning.png", TITLE)
    write_report(arms, out / "learning.png", out / "report.html", TITLE, [*NOTES, describe(lift)])
    for name in ("summary.json", "learning.png", "report.html"):
        say(f"written: {out / name}")
    say(f"in all {duration(time.monotonic() - began)}")
    return summary


def _introduce() -> None:
    (example,) = CHAIN.problems(1, Seed(0), "held-out")
    say(
        f"The task: x <- (x op d) mod {CHAIN.modulus}, {CHAIN.num_steps} steps from the last number of the prompt."
    )
    say(f"  prompt      {example.text}")
    say(f"  completion  {example.trace} </s>")
    for note in NOTES[:-1]:
        say(note)


def describe(lift: Lift) -> str:
    """The hint lift in a sentence, which says so when there is none."""
    text = f"hint lift: P(correct) {lift.plain:.1%} without hints, {lift.hinted:.1%} with hints"
    if lift.ratio is None:
        return f"{text}."
    if lift.ratio < LIFT_OF_NOTE:
        return f"{text}: {lift.ratio:.2f} times, about 1. Hints do not help here, and IGPO cannot be expected to."
    return f"{text}: {lift.ratio:.1f} times."


def run_arms(
    start: MaskedDecoder, before: Held, options: DemoOptions, num_steps: int, num_problems: int
) -> list[ArmResult]:
    """The arms one after the other; live on a terminal."""
    screen, arms = Screen(), []
    with shown_below(screen.view), progress(len(ARMS) * num_steps, "all arms") as advance:
        for arm in ARMS:
            screen.begin(arm)

            def observe(step: int, graded: Graded, metrics: Metrics) -> None:
                screen.observe(graded, metrics)
                advance(reward=metrics["reward"], all_wrong=metrics["inpaint/groups_all_wrong"])

            cfg = arm_config(arm, options.seed, num_steps)
            out = Path(options.out)
            arms.append(run_arm(arm, cfg, start, before, out, observe, num_problems))
            screen.end(arms[-1])
            say(f"{LABELS[arm]}: accuracy {before.accuracy:.1%} -> {arms[-1].after:.1%}")
    return arms


@dataclass
class Screen:
    """What a terminal shows below the bars: the arms so far, and one answer being denoised."""

    lines: dict[str, str] = field(default_factory=dict)
    arm: str = ""
    frame: Frame | None = None
    shown: float = 0.0  # when the frame came

    def begin(self, arm: str) -> None:
        self.arm = arm
        self.lines[arm] = "starting"

    def observe(self, graded: Graded, metrics: Metrics) -> None:
        self.lines[self.arm] = (
            f"reward {metrics['reward']:.3f}, all-wrong groups {metrics['inpaint/groups_all_wrong']:.0%}"
        )
        steps = 0 if self.frame is None else 2 + max(self.frame.step_map)
        if (
            time.monotonic() - self.shown >= steps / STEPS_PER_SECOND
        ):  # the last one has been told to its end
            rescued = graded.rescued.nonzero()[:, 0].tolist()
            row = rescued[0] if rescued else 0
            self.frame, self.shown = frame(graded, row, ""), time.monotonic()

    def end(self, arm: ArmResult) -> None:
        self.lines[self.arm] = f"accuracy {arm.before:.1%} -> {arm.after:.1%}"

    def view(self) -> RenderableType:
        """Called from the thread that draws."""
        rows = [Text(f"{LABELS[arm]}: {line}", COLOURS[arm]) for arm, line in self.lines.items()]
        if self.frame is not None:
            rows.append(
                denoised(self.frame, int((time.monotonic() - self.shown) * STEPS_PER_SECOND))
            )
        return Group(*rows)


def denoised(frame: Frame, step: int) -> Text:
    """A completion as it stood after `step`: hints in orange, masks as dots, a verdict when it is complete."""
    text = Text(frame.prompt + "  ", "dim")
    for token, written in zip(frame.tokens, frame.step_map, strict=True):
        if written < 0:
            text.append(f"{token} ", "bold #E69F00")
        elif written <= step:
            text.append(f"{token} ", "bold green" if written == step else "")
        else:
            text.append("\u00b7 ", "dim")
    if step >= max(frame.step_map):
        text.append("right" if frame.correct else "wrong", "green" if frame.correct else "red")
    return text


SHORT = {
    "grpo": "GRPO",
    "grpo_resample": "resampled",
    "igpo": "IGPO",
    "trace_in_group": "full trace",
}


def table(arms: Sequence[ArmResult]) -> Table:
    """One column per arm: it fits 80 characters."""
    found = Table("", *(SHORT[arm.name] for arm in arms))
    rows: dict[str, Callable[[ArmResult], str]] = {
        "held-out accuracy before": lambda arm: f"{arm.before:.1%}",
        "held-out accuracy after": lambda arm: f"{arm.after:.1%}",
        "all-wrong groups": lambda arm: f"{arm.all_wrong:.1%}",
        "... after the rescue": lambda arm: f"{arm.unrescued:.1%}",
        "second attempts right": lambda arm: _or_blank(arm.hint_success, ".1%"),
        "hint lift after": lambda arm: _or_blank(arm.hint_lift, ".1f"),
        "rollouts": lambda arm: f"{arm.rollouts:,}",
        "forwards of rollouts": lambda arm: f"{arm.forwards:,}",
        "seconds": lambda arm: f"{arm.seconds:.0f}",
    }
    for name, show in rows.items():
        found.add_row(name, *map(show, arms))
    return found


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
