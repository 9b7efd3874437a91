from __future__ import annotations

import torch

from igpo.types import Canvas, Draw, Graded, PolicyBatch, Rollouts, Seed, put, take

B, S, L = 5, 2, 3


def graded(offset: int = 0) -> Graded:
    """Every tensor holds its row number plus offset, so that moved rows can be recognised."""
    column = torch.arange(B)[:, None] + offset
    canvas = Canvas(
        column.expand(B, S + L), torch.ones(B, S + L, dtype=torch.bool), column.expand(B, S + L),
        torch.zeros(B, L, dtype=torch.bool), column[:, 0], column[:, 0], S, 99,
    )  # fmt: skip
    logprob = column.float().expand(B, L)
    rollouts = Rollouts(
        canvas, canvas.tokens, canvas.completion, logprob, logprob, column[:, 0], 7 + offset
    )
    names = tuple(str(i + offset) for i in range(B))
    flags = torch.zeros(B, dtype=torch.bool)
    return Graded(rollouts, column[:, 0].float(), flags, flags, names, {"a": column[:, 0].float()})


def test_take_selects_rows_everywhere() -> None:
    part = take(graded(), torch.tensor([3, 1]))
    assert part.completions == ("3", "1")
    assert part.rollouts.completion[:, 0].tolist() == [3, 1]
    assert part.rollouts.canvas.row_ids.tolist() == part.parts["a"].tolist() == [3, 1]
    assert part.rollouts.num_forwards == 7


def test_put_replaces_rows_and_leaves_the_rest_bitwise() -> None:
    base, rows = graded(), torch.tensor([4, 0])
    merged = put(base, rows, take(graded(100), torch.tensor([1, 2])))
    assert merged.completions == ("102", "1", "2", "3", "101")
    assert merged.rewards.tolist() == merged.parts["a"].tolist() == [102, 1, 2, 3, 101]
    assert merged.rollouts.canvas.tokens[:, 0].tolist() == [102, 1, 2, 3, 101]
    assert merged.rollouts.num_forwards == base.rollouts.num_forwards
    assert base.rewards.tolist() == [0, 1, 2, 3, 4]


def test_take_reaches_into_draws() -> None:
    canvas = graded().rollouts.canvas
    values = torch.arange(B).float()[:, None].expand(B, L)
    draw = Draw(canvas.tokens > 3, values > 2, None)
    batch = PolicyBatch(
        canvas, ((draw,), (draw, draw)), canvas.completion, (values > 0, values > 4),
        (values, None), (None, None),
    )  # fmt: skip
    part = take(batch, torch.tensor([4]))
    assert [len(draws) for draws in part.draws] == [1, 2]
    assert part.draws[1][1].masked.tolist() == [[True] * (S + L)]
    assert part.draws[1][1].canvas(part.tokens, 9).tolist() == [[9] * (S + L)]
    assert part.old_logprob[0].tolist() == [[4.0] * L]
    assert part.old_logprob[1] is None
    assert [mask.tolist() for mask in part.token_mask] == [[[True] * L], [[False] * L]]


def test_seed_streams_are_reproducible_and_distinct() -> None:
    root = Seed(3)
    assert root.at(2).named("a") == root.named("a").at(2)
    values = {s.value for s in (root, root.named("a"), root.named("b"), Seed(4).named("a"))}
    assert len(values) == 4
    assert all(0 <= v < 2**63 for v in values)
    draws = {
        float(s.generator(r).random())
        for s in (root.at(0), root.at(1), root.named("a"))
        for r in (0, 1)
    }
    assert len(draws) == 6
    assert root.generator(5).random() == root.generator(5).random()
