"""Evaluates draws: under the old policy and the reference once per batch, under the policy in every inner update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from igpo.ops import keep_top_entropy, linear_logprob
from igpo.ops._support import support_logprob
from igpo.ranks import ranks
from igpo.types import BlockPolicy, Canvas, Draw, Graded, Policy, PolicyBatch, Rollouts, Seed, take

from .combine import add_up, keep_apart
from .draws import DrawFunction, InnerUpdate

Reference = Callable[[], AbstractContextManager[Policy]]
Combine = Callable[[Tensor, Sequence[Draw]], Tensor]  # (B, J, L) log-probs of J draws -> a value
Scores = tuple[Tensor, Tensor]  # log-prob and entropy, (B, L)


@dataclass(frozen=True)
class Likelihood:
    """Evaluates a draw function.

    num_iterations: mu.   needs_reference, needs_old: what the objective asks for; nothing else is evaluated.
    entropy_filter: tau; of the hint tokens (canvas.frozen) only the max(1, floor(tau n)) of highest entropy under the
    old policy enter the loss; 1 keeps all.   mask_after_eos: score up to and including the first EOS; False: the whole
    canvas.   batch_size: rows per forward of `prepare`.   combine: from the log-probs of J draws to a value: `add_up`
    to (B, L), `keep_apart` to (B, J, L), or another of combine.py.   always_old: evaluate the old policy even when
    there is one inner update.   once: evaluate the old policy and the reference on the draws of the first inner update
    only.   temperature: of the softmax that is scored.   block_length: of the block-causal policy that the draws need;
    None: any policy will do.   on_support: the softmax is over the tokens each token was drawn from
    (`Rollouts.support`); over all of them for a token that was not drawn.   token_budget: rows are scored in a random
    order until the next would exceed this many completion tokens; None: all rows.

    No module is switched between train and eval mode here, so the three evaluations see the same mode; with dropout
    active they still differ from one another, and the first ratio is not 1.
    """

    draw: DrawFunction
    num_iterations: int
    needs_reference: bool
    entropy_filter: float
    mask_after_eos: bool
    batch_size: int
    combine: Combine = add_up
    needs_old: bool = True
    always_old: bool = False
    once: bool = False
    temperature: float = 1.0
    block_length: int | None = None
    on_support: bool = False
    token_budget: int | None = None

    def check(self, policy: Policy) -> None:
        """Raises ValueError when the draws cannot be scored under this policy."""
        found = getattr(policy, "block_length", None)
        if self.block_length not in (None, found):
            raise ValueError(
                f"likelihood: the policy must be block-causal with block_length={self.block_length}, for blocks to be "
                f"scored behind finished ones, got {found or 'one of full attention'}. "
                + (f"Set block_length={found}." if found else "Use likelihood=slices and shrink=1.")
            )

    @torch.no_grad()
    def prepare(
        self, policy: Policy, graded: Graded, seed: Seed, reference: Reference | None = None
    ) -> PolicyBatch:
        """Makes the draws of all inner updates and evaluates what does not change while the policy does.

        With one inner update the policy *is* the old policy, and old_logprob is left None: the objective then uses the
        policy's own values, detached. Call it before the first update of the batch.

        Raises:
            ValueError: a KL term without a reference; mask_after_eos without an eos_id; on_support without a recorded
                support; see `check`.
        """
        self.check(policy)
        if self.needs_reference and reference is None:
            raise ValueError(
                "likelihood: reference must be given for a KL term, got None. Pass the frozen model "
                "(or the adapter switched off) as a context manager, or set beta=0."
            )
        rollouts = graded.rollouts
        canvas, targets = rollouts.canvas, rollouts.completion
        within = self._within(rollouts)
        if self.token_budget is not None:
            within &= packed(within.sum(1), self.token_budget, canvas.row_ids, seed)[:, None]
        updates = _restrict(self.draw(rollouts, seed.named("draws")), within)
        batch = PolicyBatch(
            canvas, tuple(update.draws for update in updates), targets, (), (), (),
            tuple(update.weight for update in updates), support=self._support(rollouts),
        )  # fmt: skip
        with_old = self.needs_old and (self.num_iterations > 1 or self.always_old)
        filtered = self.entropy_filter < 1 and bool(canvas.frozen.any())
        asked = updates[: 1 if self.once and not filtered else None]
        used = replace(batch, draws=batch.draws[: len(asked)])
        old = self._of_draws(policy, used, None if with_old else self._hinted(canvas, filtered))
        nothing: list[Tensor | None] = [None] * len(updates)
        ref = list(nothing)
        if self.needs_reference and reference is not None:
            with reference() as frozen:
                scores = self._of_draws(frozen, used, None)
                ref = [self._value(scores, update) for update in asked]
        return replace(
            batch,
            token_mask=tuple(self._token_mask(u, canvas, old if filtered else {}) for u in updates),
            old_logprob=tuple(
                [self._value(old, u) for u in asked] + nothing[len(asked) :]
                if with_old
                else nothing
            ),
            ref_logprob=tuple(ref + nothing[len(ref) :]),
            first=_stack(old, updates[0].draws) if with_old else None,
        )

    def __call__(self, policy: Policy, batch: PolicyBatch, inner: int) -> Tensor:
        """The value of inner update `inner`, nats, with gradient; 0 where the draws do not score."""
        values = evaluate(policy, batch, inner, self.temperature)
        return self.combine(values, batch.draws[inner])

    def _hinted(self, canvas: Canvas, filtered: bool) -> Tensor:
        """The rows whose entropy is asked for when nothing else of the old policy is."""
        rows = canvas.frozen.any(1).nonzero()[:, 0]
        return rows if filtered else rows[:0]

    def _of_draws(
        self, policy: Policy, batch: PolicyBatch, rows: Tensor | None
    ) -> dict[int, Scores]:
        """id of a draw -> its scores of `rows` (None: all), 0 elsewhere. Updates that share a draw share its scores."""
        found: dict[int, Scores] = {}
        size, tokens = len(batch.targets), batch.tokens
        some = torch.arange(size, device=batch.targets.device) if rows is None else rows
        for draw in (draw for draws in batch.draws for draw in draws):
            if id(draw) in found or some.numel() == 0:
                continue

            def of(part: Tensor, draw: Draw = draw) -> Scores:
                canvas, support = take(batch.canvas, part), _rows_of(batch.support, part)
                return score(
                    policy, canvas, tokens[part], take(draw, part), self.temperature, support
                )

            logprob, entropy = ranks().by_rows(of, some, self.batch_size)
            if rows is not None:
                logprob, entropy = (
                    x.new_zeros(batch.targets.shape).index_copy(0, rows, x)
                    for x in (logprob, entropy)
                )
            found[id(draw)] = (logprob, entropy)
        return found

    def _value(self, scores: dict[int, Scores], update: InnerUpdate) -> Tensor:
        return self.combine(_stack(scores, update.draws), update.draws)

    def _support(self, rollouts: Rollouts) -> Tensor | None:
        if self.on_support and rollouts.support is None:
            raise ValueError(
                "likelihood: rollouts must have a support with filtered_scoring='support', got None. Roll out with "
                "record_support=true."
            )
        return rollouts.support if self.on_support else None

    def _within(self, rollouts: Rollouts) -> Tensor:
        """(B, L) bool: the completion as far as it is scored."""
        if not self.mask_after_eos:
            return torch.ones_like(rollouts.canvas.frozen)
        if rollouts.canvas.eos_id is None:
            raise ValueError(
                "likelihood: mask_after_eos must have an eos_id on the canvas, got None. "
                "Give the model an eos_token_id or set mask_after_eos=False."
            )
        is_eos = rollouts.completion == rollouts.canvas.eos_id
        return is_eos.long().cumsum(1) - is_eos.long() == 0

    def _token_mask(self, update: InnerUpdate, canvas: Canvas, old: dict[int, Scores]) -> Tensor:
        if not old:
            return self._apart(update.counted, update)
        of_draws = torch.stack([old[id(draw)][1] for draw in update.draws])
        times = torch.stack([draw.score for draw in update.draws]).sum(0).clamp(min=1)
        counted, frozen = update.counted, canvas.frozen
        mean = (of_draws.sum(0) / times).float()
        kept = keep_top_entropy(mean, counted & frozen, self.entropy_filter)
        return self._apart((counted & ~frozen) | kept, update)

    def _apart(self, counted: Tensor, update: InnerUpdate) -> Tensor:
        """counted, of every draw where they are kept apart."""
        if self.combine is not keep_apart:
            return counted
        return counted[:, None] & torch.stack([draw.score for draw in update.draws], 1)


def packed(lengths: Tensor, budget: int, row_ids: Tensor, seed: Seed) -> Tensor:
    """(B,) bool: the rows of a random order as long as their lengths (B,) add up to at most `budget`.

    The order depends on seed and row ids alone. It ends at the first row that does not fit: to go on with shorter ones
    would favour short completions. Source: arXiv:2506.14731 (C3PO); the order is ours.
    """
    stream = seed.named("budget")
    place = torch.tensor([stream.generator(row).random() for row in row_ids.tolist()])
    order = place.argsort().to(lengths.device)
    return torch.zeros_like(lengths, dtype=torch.bool).index_copy(
        0, order, lengths[order].cumsum(0) <= budget
    )


def evaluate(policy: Policy, batch: PolicyBatch, inner: int, temperature: float = 1.0) -> Tensor:
    """(B, J, L) log-probs of the draws of an inner update, 0 where they do not score.

    Rows in which a draw scores nothing are not forwarded. When no draw scores anything at all, one row is, so that
    the result still belongs to the graph.
    """
    draws, tokens = batch.draws[inner], batch.tokens
    scoring = [draw for draw in draws if bool(draw.score.any())] or list(draws[:1])
    found = {
        id(draw): score(policy, batch.canvas, tokens, draw, temperature, batch.support)[0]
        for draw in scoring
    }
    zeros = torch.zeros_like(next(iter(found.values())))
    return torch.stack([found.get(id(draw), zeros) for draw in draws], 1)


def score(
    policy: Policy, canvas: Canvas, tokens: Tensor, draw: Draw, temperature: float = 1.0,
    support: Tensor | None = None,
) -> Scores:  # fmt: skip
    """(B, L) log-prob and entropy of one draw, unweighted; at least one row is forwarded.

    tokens: (B, T), the completed canvases.   support: (B, L, K), see PolicyBatch.
    """
    rows = draw.score.any(1).nonzero()[:, 0]
    if rows.numel() == 0:
        rows = torch.arange(min(1, len(tokens)), device=tokens.device)
    masked = draw.canvas(tokens, canvas.mask_id)[rows]
    place = canvas.attention_mask[rows], canvas.position_ids[rows]
    if draw.beside_clean:
        hidden = cast(BlockPolicy, policy).hidden_of_blocks(masked, tokens[rows], *place)
    else:
        hidden = policy.hidden(masked, *place)
    read = draw.score[rows]
    targets = tokens[:, canvas.prompt_length :] if draw.targets is None else draw.targets
    states = hidden[:, canvas.prompt_length :][read]
    kept = None if support is None else support[rows][read]
    logprob, entropy = _read(policy, states, targets[rows][read], kept, temperature)
    spread = torch.zeros(draw.score.shape, dtype=logprob.dtype, device=logprob.device)
    return spread.masked_scatter(draw.score, logprob), spread.masked_scatter(draw.score, entropy)


def _read(
    policy: Policy, states: Tensor, targets: Tensor, support: Tensor | None, temperature: float
) -> Scores:
    """(N,) of hidden states (N, D); support (N, K), of which a row without any is scored over all tokens."""
    head, options = policy.head_weight, {"bias": policy.head_bias, "temperature": temperature}
    if support is None or not len(states):
        return linear_logprob(states, head, targets, **options)
    drawn = support[:, 0] >= 0
    if bool(drawn.all()):
        return support_logprob(states, head, targets, support, **options)
    inside = support_logprob(states[drawn], head, targets[drawn], support[drawn], **options)
    outside = linear_logprob(states[~drawn], head, targets[~drawn], **options)
    logprob, entropy = (
        torch.zeros_like(states[:, 0], dtype=a.dtype)
        .masked_scatter(drawn, a)
        .masked_scatter(~drawn, b)
        for a, b in zip(inside, outside, strict=True)
    )
    return logprob, entropy


def _rows_of(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values[rows]


def _stack(scores: dict[int, Scores], draws: Sequence[Draw]) -> Tensor:
    """(B, J, L)."""
    return torch.stack([scores[id(draw)][0] for draw in draws], 1)


def _restrict(updates: Sequence[InnerUpdate], within: Tensor) -> list[InnerUpdate]:
    """The updates reading nothing outside `within`; draws that were shared still are."""
    if bool(within.all()):
        return list(updates)
    distinct = {
        id(draw): replace(draw, score=draw.score & within) for u in updates for draw in u.draws
    }
    return [
        replace(
            update,
            draws=tuple(distinct[id(draw)] for draw in update.draws),
            counted=update.counted & within,
        )
        for update in updates
    ]
