"""What every critique is, how a critic is read on draws, and the gradient of what it learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from igpo.config import RolloutConfig
from igpo.ranks import ranks
from igpo.types import (
    Canvas,
    Draw,
    Graded,
    Metrics,
    Policy,
    PolicyBatch,
    Prompt,
    Rollouts,
    Seed,
    take,
)

# (tokens, attention_mask, position_ids), each (B, T) -> (B, T) float32
CriticNetwork = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a critic is trained on: N sequences, read on J draws.

    tokens: (N, T), the completed canvases.   weight: (N, J, 1) or (N, J, L), what the terms of the loss are multiplied
    by; they hold every mean over the batch, so that the losses of any parts add up.
    """

    canvas: Canvas
    tokens: Tensor
    draws: tuple[Draw, ...]
    weight: Tensor

    @property
    def kind(self) -> str:
        """What comes before the name of a row in error messages."""
        return ""

    @property
    def score(self) -> Tensor:
        """(N, J, L) bool: where the draws are read."""
        return torch.stack([draw.score for draw in self.draws], 1)


class Critique(Protocol):
    """What an algorithm does with a critic."""

    def roll_out(
        self, network: CriticNetwork, policy: Policy, canvas: Canvas, cfg: RolloutConfig, seed: Seed
    ) -> Rollouts:
        """The completions of a step, with or without help of the critic."""
        ...

    def judge(
        self, network: CriticNetwork, policy: Policy, prompts: Sequence[Prompt], graded: Graded, batch: PolicyBatch,
        advantages: Tensor, seed: Seed,
    ) -> tuple[Tensor, tuple[Lesson, ...], Metrics]:  # fmt: skip
        """Before the first update: the advantages of the batch's draws, (B, J, 1) or (B, J, L); what the critic is to
        learn from; and what it was worth.

        advantages: (B,), of whole completions.
        """
        ...

    def loss(self, values: Tensor, lesson: Lesson) -> tuple[Tensor, Metrics]:
        """The loss of (some rows and draws of) a lesson, whose values are (N, J, L); it and the metrics add up."""
        ...


L = TypeVar("L", bound=Lesson)


def read(network: CriticNetwork, canvas: Canvas, tokens: Tensor, draw: Draw) -> Tensor:
    """(N, L): the critic's values on the draw's canvas where it scores, 0 elsewhere."""
    masked = draw.canvas(tokens, canvas.mask_id)
    values = network(masked, canvas.attention_mask, canvas.position_ids)
    return values[:, canvas.prompt_length :].masked_fill(~draw.score, 0.0)


def read_all(
    network: CriticNetwork, canvas: Canvas, tokens: Tensor, draws: Sequence[Draw], size: int
) -> Tensor:
    """(N, J, L): `read` of several draws, `size` rows a forward; each process does its share of the rows.

    Rows in which a draw scores nothing are not forwarded.
    """
    found = []
    for draw in draws:

        def of(part: Tensor, draw: Draw = draw) -> list[Tensor]:
            return [read(network, take(canvas, part), tokens[part], take(draw, part))]

        scoring = draw.score.any(1).nonzero()[:, 0]
        rows = scoring if len(scoring) else torch.arange(min(1, len(tokens)), device=tokens.device)
        (values,) = ranks().by_rows(of, rows, size)
        spread = values.new_zeros(draw.score.shape)
        found.append(spread.index_copy(0, rows, values))
    return torch.stack(found, 1)


def fit(
    network: CriticNetwork, critique: Critique, lesson: Lesson, rows: Tensor, size: int
) -> Iterator[tuple[float, Metrics]]:
    """Adds the gradient of the lesson's loss that comes from `rows`: one draw of `size` rows at a time.

    Yields loss and metrics of each part; they add up. What has no weight is not forwarded. Where several processes
    train, each does its share of the rows.
    """
    for j in range(len(lesson.draws)):
        one = only(lesson, j)
        matters = one.draws[0].score[rows].any(1) & one.weight[rows].flatten(1).ne(0).any(1)
        for part in ranks().parts(rows[matters], size):
            some = take(one, part)
            values = read(network, some.canvas, some.tokens, some.draws[0])[:, None]
            loss, found = critique.loss(values, some)
            loss.backward()
            yield float(loss.detach()), found


def only(lesson: L, j: int) -> L:
    """The lesson with one of its draws."""
    cut = {
        item.name: value[:, j : j + 1]
        for item in fields(lesson)
        if isinstance(value := getattr(lesson, item.name), Tensor) and value.dim() == 3
    }
    return replace(lesson, draws=lesson.draws[j : j + 1], **cut)
