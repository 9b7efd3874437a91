"""Bias and variance of the likelihood estimators, on models small enough to list every mask, order and sequence.

    python benchmarks/estimators.py [--out FILE.json]

60 random tables of logits (tests/tables.py, 4 tokens of 2 words), 4000 estimates each; float64. The gradient part lists
every order and every sequence of 3 tokens. A CPU does it in about a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from report import machine

from igpo.rl import likelihood as lk
from igpo.rl.likelihood.trajectory import _strata
from igpo.types import PolicyBatch, Seed

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from tables import TablePolicy, chain, elbo, orders, rolled, sequences

TOYS, ROWS, LENGTH, SEED = 60, 4000, 4, Seed(0).at(1)


def estimates(policy, sampler, num_draws: int, name: str) -> torch.Tensor:
    """(ROWS, LENGTH) the estimate of each token, of one sequence."""
    o = torch.tensor([[0, 1, 1, 0]]).expand(ROWS, LENGTH)
    rollouts = rolled(o)
    (update,) = lk.elbo(
        rollouts, SEED.named(name), num_iterations=1, num_draws=num_draws, sampler=sampler
    )
    batch = PolicyBatch(rollouts.canvas, (update.draws,), o, (), (None,), (None,))
    with torch.no_grad():
        return lk.add_up(lk.evaluate(policy, batch, 0), update.draws)


def alone(rollouts, positions, u, seed):
    """The first half of a pair by itself: l ~ U{0..L}, weight (L+1)/l."""
    first, _ = lk.in_pairs(rollouts, positions, u, seed)
    return (replace(first, weight=2.0 * first.weight),)


def variances() -> dict[str, object]:
    found: dict[str, list[float]] = {}
    wins: dict[str, int] = defaultdict(int)
    for toy in range(TOYS):
        policy = TablePolicy(LENGTH, seed=toy)
        truth = elbo(policy, torch.tensor([[0, 1, 1, 0]])).item()
        kinds = {
            "1/t, one draw": estimates(policy, lk.by_ratio, 1, "a"),
            "L/l, one draw": estimates(policy, lk.by_count, 1, "a"),
            "L/l, two stratified draws": estimates(policy, lk.by_count, 2, "a"),
            "pair of complements": estimates(policy, lk.in_pairs, 1, "a"),
        }
        single = {name: x.sum(1) for name, x in kinds.items()}
        two = (single["L/l, one draw"] + estimates(policy, lk.by_count, 1, "b").sum(1)) / 2
        single["L/l, two independent draws"] = two
        for name, x in single.items():
            found.setdefault(name, []).append(float(x.var()))
            assert abs(x.mean() - truth) < 6 * x.std() / math.sqrt(ROWS), (toy, name)
        near = TablePolicy(LENGTH, seed=toy)
        with torch.no_grad():
            near.table.add_(0.05 * TablePolicy(LENGTH, seed=1000 + toy).table)
        moved = estimates(near, lk.by_count, 1, "a").sum(1)
        shared = moved - single["L/l, one draw"]
        apart = moved - estimates(policy, lk.by_count, 1, "b").sum(1)
        found.setdefault("difference, shared draws", []).append(float(shared.var()))
        found.setdefault("difference, separate draws", []).append(float(apart.var()))
        pair = kinds["pair of complements"]
        rivals = {
            "(L+1)/l": [estimates(policy, alone, 1, name) for name in "cd"],
            "L/l": [kinds["L/l, one draw"], estimates(policy, lk.by_count, 1, "b")],
        }
        for name, (one, other) in rivals.items():
            mean = (one + other) / 2
            wins[f"sequence, {name}"] += bool(pair.sum(1).var() < mean.sum(1).var())
            wins[f"every token, {name}"] += bool((pair.var(0) < mean.var(0)).all())
    medians = {name: torch.tensor(x).median().item() for name, x in found.items()}
    return {
        "median variance": medians,
        "toys where a pair beats two independent draws": dict(wins),
        "toys": TOYS,
    }


def strata() -> dict[str, float]:
    drawn = torch.stack([_strata(12, SEED.generator(row)).mean() for row in range(ROWS)])
    return {"mean of 12 strata": float(drawn.var()), "mean of 12 independent": 1 / 12 / 12}


def gradients() -> dict[str, dict[str, float]]:
    """Against the gradient of E[r] under random unmasking, one token a step: median over toys."""
    o, length = sequences(3), 3
    everything = torch.ones(length, dtype=torch.bool)
    found: dict[str, list[tuple[float, float]]] = {}
    for toy in range(TOYS):
        policy = TablePolicy(length, seed=toy)
        rewards = torch.randn(
            len(o), generator=torch.Generator().manual_seed(toy), dtype=torch.float64
        )
        true = sum(chain(policy, o, order).exp() for order in orders(length)) / math.factorial(
            length
        )
        (truth,) = torch.autograd.grad((true * rewards).sum(), policy.table)
        weight, per_order = true.detach(), []
        for order in orders(length):
            logp = chain(policy, o, order)
            per_order.append((logp.exp().detach() * rewards * logp).sum() / math.factorial(length))
        objectives = {
            "all steps (agrpo's expectation)": sum(per_order),
            "elbo": (weight * rewards * elbo(policy, o)).sum(),
            "mean-field": (weight * rewards * policy.logp(o, everything).sum(1)).sum(),
        }
        for name, value in objectives.items():
            (g,) = torch.autograd.grad(value, policy.table, retain_graph=True)
            error = float((g - truth).norm() / truth.norm())
            cosine = float((g * truth).sum() / (g.norm() * truth.norm()))
            found.setdefault(name, []).append((error, cosine))
    medians = {name: torch.tensor(x).median(0).values.tolist() for name, x in found.items()}
    return {name: {"relative error": e, "cosine": c} for name, (e, c) in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = {
        "machine": machine(),
        "variance": variances(),
        "strata": strata(),
        "gradient": gradients(),
    }
    text = json.dumps(found, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
