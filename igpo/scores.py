"""Numbers that follow from the verdicts of an evaluation, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .types import Seed

Z = 1.959963984540054  # of a 95 % interval
RESAMPLES = (
    2000  # of the bootstrap; chosen: the ends of an interval move by a few percent of its width
)


@dataclass(frozen=True)
class Completion:
    """One line of predictions_file."""

    row: int
    sample: int
    prompt: str
    completion: str
    answer: str | None
    correct: bool
    reward: float
    num_tokens: int  # before the first EOS
    num_steps: int
    max_completion_length: int = 0  # of the canvas
    failure: str | None = None  # of the verifier: timeout, memory, crash


def summary(lines: Sequence[Completion], seed: Seed | None = None) -> dict[str, float]:
    """Accuracy, pass@k and avg@k with their intervals, reward, lengths, denoise steps and failures of the verifier
    (verify/timeouts among verify/failures), of the completions of an evaluation.

    accuracy is the mean over problems of the fraction of correct completions, with Wilson's 95 % interval for the
    number of problems (completions of a problem are not independent). With several completions a problem also avg@n,
    the same number with a bootstrap interval, and pass@k for k = 1, 2, 4, … n with theirs: 95 %, percentiles of
    RESAMPLES draws of the problems with replacement, which keep a problem's completions together. `seed` is that of the
    draws.
    """
    per_problem: dict[int, list[bool]] = {}
    for line in lines:
        per_problem.setdefault(line.row, []).append(line.correct)
    rates = [sum(verdicts) / len(verdicts) for verdicts in per_problem.values()]
    samples = min(map(len, per_problem.values()))
    accuracy = sum(rates) / len(rates)
    low, high = wilson(accuracy, len(rates))
    numbers = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
    if samples > 1:
        measures = {f"avg@{samples}": rates}
        for k in (2**i for i in range(samples.bit_length())):
            measures[f"pass@{k}"] = [pass_at_k(len(v), sum(v), k) for v in per_problem.values()]
        for name, values in measures.items():
            numbers |= _with_interval(name, values, seed or Seed(0))
    return {
        **numbers,
        "reward": sum(line.reward for line in lines) / len(lines),
        "completion_length": sum(line.num_tokens for line in lines) / len(lines),
        "num_steps": sum(line.num_steps for line in lines) / len(lines),
        "num_problems": float(len(rates)),
        "verify/timeouts": float(sum(line.failure == "timeout" for line in lines)),
        "verify/failures": float(sum(line.failure is not None for line in lines)),
    }


def _with_interval(name: str, values: Sequence[float], seed: Seed) -> dict[str, float]:
    low, high = bootstrap(values, seed)
    return {name: sum(values) / len(values), f"{name}_low": low, f"{name}_high": high}


def bootstrap(
    values: Sequence[float], seed: Seed, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean, over draws of the values with replacement (Efron, 1979)."""
    rng, found = seed.named("bootstrap").generator(), np.asarray(values, dtype=np.float64)
    # row by row: a (resamples, problems) table of indices would not fit for large evaluations
    means = [found[rng.integers(len(found), size=len(found))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n completions, c of them correct, hold a correct one.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a fraction of n trials."""
    middle = rate + Z * Z / (2 * n)
    half = Z * math.sqrt(rate * (1 - rate) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
