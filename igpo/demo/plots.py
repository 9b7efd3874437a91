"""The demo's figure: held-out accuracy and all-wrong fraction of every arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .results import ArmResult

# one colour per arm everywhere: Okabe and Ito's palette, distinguishable without colour vision
COLOURS = {
    "grpo": "#0072B2",
    "grpo_resample": "#56B4E9",
    "igpo": "#D55E00",
    "trace_in_group": "#009E73",
    "trace_as_hints": "#CC79A7",
}
LABELS = {
    "grpo": "GRPO",
    "grpo_resample": "GRPO, all-wrong groups resampled",
    "igpo": "IGPO",
    "trace_in_group": "full trace put into the group",
    "trace_as_hints": "full trace, entropy-filtered as hints are",
}


def plot(arms: Sequence[ArmResult], path: Path, title: str) -> None:
    """Writes a PNG: accuracy against rollouts and against model forwards, and the fraction of groups that
    are all wrong when the policy learns from them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    for arm in arms:
        style = {"color": COLOURS[arm.name], "label": LABELS[arm.name]}
        measured = [p for p in arm.points if p.accuracy is not None]
        accuracy = [100 * p.accuracy for p in measured if p.accuracy is not None]
        axes[0].plot([p.rollouts for p in measured], accuracy, marker="o", ms=3, **style)
        axes[1].plot([p.forwards for p in measured], accuracy, marker="o", ms=3, **style)
        axes[2].plot(
            [p.rollouts for p in arm.points],
            _smooth([100 * p.unrescued for p in arm.points]),
            **style,
        )
    for axis, x, y in zip(
        axes,
        ("rollouts", "model forwards (sequences)", "rollouts"),
        ("held-out accuracy, %", "held-out accuracy, %", "groups that teach nothing, %"),
        strict=True,
    ):
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_study(arms: Mapping[str, Mapping[str, Any]], path: Path, num_seeds: int) -> None:
    """Writes a PNG: means with their 95 % bands, of held-out accuracy and of the groups that are all wrong after any
    rescue, against rollouts and against forwards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        2, 2, figsize=(10, 7), sharex="col", sharey="row", constrained_layout=True
    )
    shown = (("accuracy", "held-out accuracy, %"), ("unrescued", "groups that teach nothing, %"))
    for axis, (measure, x) in zip(
        grid.flat, [(m, x) for m, _ in shown for x in ("rollouts", "forwards")], strict=True
    ):
        for name, found in arms.items():
            curve = [p for p in found["curve"] if measure in p]
            places = [p[x] for p in curve]
            middle = [100 * p[measure]["value"] for p in curve]
            half = [100 * p[measure]["half_width"] for p in curve]
            axis.plot(places, middle, marker="o", ms=3, color=COLOURS[name], label=LABELS[name])
            low, high = (
                [m + sign * h for m, h in zip(middle, half, strict=True)] for sign in (-1, 1)
            )
            axis.fill_between(places, low, high, color=COLOURS[name], alpha=0.15, lw=0)
        axis.set_xlabel(f"{x} (mean of {num_seeds} seeds)")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis, (_, label) in zip(grid[:, 0], shown, strict=True):
        axis.set_ylabel(label)
    grid[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Mean over the last `width` steps: a step has few groups."""
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(values))
    ]
