"""Likelihoods: which canvases are forwarded, and which tokens are read, to score a completion.

A masked-diffusion model has no left-to-right factorisation; every method scores log p(o^k | canvas) on canvases of its
choice. A draw function makes those choices, once per rollout batch and for all inner updates; `Likelihood` evaluates
the same draws under the old policy, the reference and the policy (common random numbers). A new estimator is a
new draw function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from igpo.ops import forward_mask, keep_top_entropy, linear_logprob
from igpo.types import GIVEN, Canvas, Draw, Graded, Policy, PolicyBatch, Rollouts, Seed, take

Reference = Callable[[], AbstractContextManager[Policy]]


@dataclass(frozen=True)
class InnerUpdate:
    """The draws of one inner update, and the completion tokens they score as the policy's own: (B, L) bool."""

    draws: tuple[Draw, ...]
    counted: Tensor


# (rollouts, seed) -> one InnerUpdate per inner update; the same object where nothing differs, then it is evaluated once
DrawFunction = Callable[[Rollouts, Seed], Sequence[InnerUpdate]]


@dataclass(frozen=True)
class Likelihood:
    """Evaluates a draw function.

    num_iterations: mu.   needs_reference: the objective has a KL term.   entropy_filter: tau; of the hint tokens
    (canvas.frozen) only the max(1, floor(tau n)) of highest entropy under the old policy enter the loss; 1 keeps all.
    mask_after_eos: score up to and including the first EOS; False: the whole canvas.   batch_size: rows per forward of
    `prepare`.

    No module is switched between train and eval mode here, so the three evaluations see the same mode; with dropout
    active they still differ from one another, and the first ratio is not 1.
    """

    draw: DrawFunction
    num_iterations: int
    needs_reference: bool
    entropy_filter: float
    mask_after_eos: bool
    batch_size: int

    @torch.no_grad()
    def prepare(
        self, policy: Policy, graded: Graded, seed: Seed, reference: Reference | None = None
    ) -> PolicyBatch:
        """Makes the draws of all inner updates and evaluates what does not change while the policy does.

        With one inner update the policy *is* the old policy, and old_logprob is left None: the objective then uses the
        policy's own values, detached. Call it before the first update of the batch.

        Raises:
            ValueError: a KL term without a reference; mask_after_eos without an eos_id.
        """
        rollouts = graded.rollouts
        canvas, targets = rollouts.canvas, rollouts.completion
        within = self._completion_mask(rollouts)
        updates = self.draw(rollouts, seed.named("draws"))
        distinct = {id(update): _restrict(update, within) for update in updates}
        old = {key: self._old(policy, canvas, targets, item) for key, item in distinct.items()}
        masks = {
            key: self._token_mask(item.counted, canvas, old[key][1])
            for key, item in distinct.items()
        }
        ref: dict[int, Tensor | None] = dict.fromkeys(distinct)
        if self.needs_reference:
            if reference is None:
                raise ValueError(
                    "likelihood: reference must be given for a KL term, got None. Pass the frozen model "
                    "(or the adapter switched off) as a context manager, or set beta=0."
                )
            with reference() as frozen:
                for key, item in distinct.items():
                    ref[key] = self._in_batches(frozen, canvas, targets, item.draws)[0]
        keys = [id(update) for update in updates]
        return PolicyBatch(
            canvas,
            tuple(distinct[key].draws for key in keys),
            targets,
            tuple(masks[key] for key in keys),
            tuple(old[key][0] for key in keys),
            tuple(ref[key] for key in keys),
        )

    def __call__(self, policy: Policy, batch: PolicyBatch, inner: int) -> Tensor:
        """(B, L) log-probs of inner update `inner`, nats, with gradient; 0 where the draws do not score."""
        return evaluate(policy, batch.canvas, batch.targets, batch.draws[inner])[0]

    def _old(
        self, policy: Policy, canvas: Canvas, targets: Tensor, update: InnerUpdate
    ) -> tuple[Tensor | None, Tensor | None]:
        """Log-prob and entropy under the old policy, None where nothing asks for them."""
        filtered = self.entropy_filter < 1 and bool(canvas.frozen.any())
        if self.num_iterations > 1:
            return self._in_batches(policy, canvas, targets, update.draws)
        if not filtered:
            return None, None
        rows = canvas.frozen.any(1).nonzero()[:, 0]  # only hinted rows have tokens to rank
        draws = tuple(take(draw, rows) for draw in update.draws)
        _, of_rows = self._in_batches(policy, take(canvas, rows), targets[rows], draws)
        return None, of_rows.new_zeros(targets.shape).index_copy(0, rows, of_rows)

    def _in_batches(
        self, policy: Policy, canvas: Canvas, targets: Tensor, draws: Sequence[Draw]
    ) -> tuple[Tensor, Tensor]:
        chunks = torch.arange(len(targets), device=targets.device).split(self.batch_size)
        parts = [
            evaluate(
                policy, take(canvas, rows), targets[rows], tuple(take(draw, rows) for draw in draws)
            )
            for rows in chunks
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _completion_mask(self, rollouts: Rollouts) -> Tensor:
        if not self.mask_after_eos:
            return torch.ones_like(rollouts.canvas.frozen)
        if rollouts.canvas.eos_id is None:
            raise ValueError(
                "likelihood: mask_after_eos must have an eos_id on the canvas, got None. "
                "Give the model an eos_token_id or set mask_after_eos=False."
            )
        is_eos = rollouts.completion == rollouts.canvas.eos_id
        return is_eos.long().cumsum(1) - is_eos.long() == 0

    def _token_mask(self, counted: Tensor, canvas: Canvas, entropy: Tensor | None) -> Tensor:
        hints = counted & canvas.frozen
        if self.entropy_filter >= 1 or entropy is None:
            return counted
        return (counted & ~canvas.frozen) | keep_top_entropy(
            entropy.float(), hints, self.entropy_filter
        )


def evaluate(
    policy: Policy, canvas: Canvas, targets: Tensor, draws: Sequence[Draw]
) -> tuple[Tensor, Tensor]:
    """(B, L) log-prob and (B, L) entropy: the weighted sum over the draws, 0 where none scores.

    Rows in which a draw scores nothing are not forwarded. When no draw scores anything at all, one row is, so that
    the result still belongs to the graph.
    """
    scoring = [draw for draw in draws if bool(draw.score.any())] or list(draws[:1])
    logprob, entropy = _evaluate_one(policy, canvas, targets, scoring[0])
    for draw in scoring[1:]:
        more = _evaluate_one(policy, canvas, targets, draw)
        logprob, entropy = logprob + more[0], entropy + more[1]
    return logprob, entropy


def _evaluate_one(
    policy: Policy, canvas: Canvas, targets: Tensor, draw: Draw
) -> tuple[Tensor, Tensor]:
    rows = draw.score.any(1).nonzero()[:, 0]
    if rows.numel() == 0:
        rows = torch.arange(min(1, len(targets)), device=targets.device)
    hidden = policy.hidden(
        draw.tokens[rows], canvas.attention_mask[rows], canvas.position_ids[rows]
    )
    score = draw.score[rows]
    logprob, entropy = linear_logprob(
        hidden[:, canvas.prompt_length :][score],
        policy.head_weight,
        targets[rows][score],
        bias=policy.head_bias,
    )
    spread = torch.zeros(targets.shape, dtype=logprob.dtype, device=logprob.device)
    logprob, entropy = (spread.masked_scatter(draw.score, x) for x in (logprob, entropy))
    if draw.weight is None:
        return logprob, entropy
    return logprob * draw.weight, entropy * draw.weight


def mean_field(
    rollouts: Rollouts,
    seed: Seed,
    *,
    num_iterations: int,
    p_mask_prompt: float = 0.0,
    hint_mode: str = "score",
) -> list[InnerUpdate]:
    """log p(o^k | prompt, [MASK]^L): every token from one forward of the fully masked completion.

    p_mask_prompt: each prompt token is masked with this probability, anew for every inner update.

    Source: arXiv:2504.12216, section 4.1 (diffu-GRPO, p = 0.15); arXiv:2509.10396 (IGPO, p = 0).
    """
    scored = _scored(rollouts, hint_mode)
    tokens = _mask_completion(rollouts, scored)
    if p_mask_prompt == 0:
        return [InnerUpdate((Draw(tokens, scored),), scored)] * num_iterations
    canvas = rollouts.canvas
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    prompt = canvas.attention_mask & (columns < canvas.prompt_length)
    ratio = torch.full((len(tokens),), p_mask_prompt, device=tokens.device)
    updates = []
    for inner in range(num_iterations):
        noisy, _ = forward_mask(
            tokens, prompt, ratio, mask_id=canvas.mask_id, seed=seed.named(f"prompt/{inner}").value,
            step=seed.step, row_ids=canvas.row_ids,
        )  # fmt: skip
        updates.append(InnerUpdate((Draw(noisy, scored),), scored))
    return updates


def random_mask(
    rollouts: Rollouts,
    seed: Seed,
    *,
    num_iterations: int,
    num_levels: int,
    first_level: tuple[int, int],
    exact: bool = True,
    score_visible: bool = False,
    hint_mode: str = "score",
) -> list[InnerUpdate]:
    """log p(o^k | prompt, canvas with a random part masked), of the masked tokens; more is masked in each inner update.

    Per row t_1 ~ U{first_level}, then mask_schedule up to num_levels; t_n / num_levels of the completion is masked.

    exact: that share, rounded to tokens (UniGRPO); False: every token with that probability (released IGPO code).
    score_visible: also reads the tokens that are not masked, which then enter a mean over the whole canvas but not
    `counted` (released IGPO code).

    Source: arXiv:2505.15809, section 4.3 (UniGRPO).
    """
    canvas, completion = rollouts.canvas, rollouts.completion
    stream = seed.named("first_level")
    first = [
        int(stream.generator(row).integers(*first_level, endpoint=True))
        for row in canvas.row_ids.tolist()
    ]
    levels = [mask_schedule(level, num_iterations, num_levels) for level in first]
    scored = _scored(rollouts, hint_mode)
    updates = []
    for inner in range(num_iterations):
        ratio = torch.tensor([row[inner] / num_levels for row in levels], device=completion.device)
        noisy, masked = forward_mask(
            completion, scored, ratio, mask_id=canvas.mask_id, seed=seed.named(f"mask/{inner}").value,
            step=seed.step, row_ids=canvas.row_ids, exact=exact,
        )  # fmt: skip
        tokens = torch.cat([rollouts.tokens[:, : canvas.prompt_length], noisy], 1)
        updates.append(InnerUpdate((Draw(tokens, scored if score_visible else masked),), masked))
    return updates


def mask_schedule(first: int, num_iterations: int, num_levels: int) -> tuple[int, ...]:
    """t_n = floor((n-1)/(mu-1) (T - t_1) + t_1), n = 1..mu: from t_1 to T. Source: arXiv:2505.15809, section 4.3.

    >>> mask_schedule(300, 4, 1000)
    (300, 533, 766, 1000)
    """
    gaps = max(1, num_iterations - 1)
    return tuple(first + n * (num_levels - first) // gaps for n in range(num_iterations))


def step_map(
    rollouts: Rollouts,
    seed: Seed,
    *,
    num_iterations: int,
    num_slices: int,
    hint_mode: str = "score",
    hint_order: Tensor | None = None,
) -> list[InnerUpdate]:
    """log p(o^k | the canvas at the start of the slice of denoise steps that committed o^k).

    Each row's steps are cut into num_slices runs of consecutive steps, the cuts drawn anew for every inner update; a
    run's canvas is rebuilt by masking step_map >= its first step. One slice is mean-field on the generated tokens; as
    many slices as steps is the trajectory's own log-likelihood. EOS filled in by the early stop is masked and not
    scored.

    Hints have no step. hint_mode "score" reads them from one more canvas, fully masked; "condition" leaves them visible
    without gradient; "replay" gives every token of a row with hints the step hint_order says ((L,) int64, e.g.
    rollout.pseudo_order: left to right), as if the policy had written the row in that order.

    Source: arXiv:2509.06949 (TraceRL, slices of equal length; random cuts are ours).
    """
    canvas, order, num_steps = rollouts.canvas, rollouts.step_map, rollouts.num_steps
    filled = (order != GIVEN) & (order >= num_steps[:, None])
    if hint_mode == "replay":
        assert hint_order is not None, "replay needs an order"
        hinted = (order == GIVEN).any(1)
        steps = hint_order.to(order.device)
        order = torch.where(hinted[:, None], steps, order)
        num_steps = torch.where(hinted, steps.max() + 1, num_steps)
    generated = (order != GIVEN) & ~filled
    hints = order == GIVEN if hint_mode == "score" else torch.zeros_like(generated)
    extra = (
        (Draw(_mask_completion(rollouts, torch.ones_like(hints)), hints),) if hints.any() else ()
    )
    updates = []
    for inner in range(num_iterations):
        stream = seed.named(f"slices/{inner}")
        edges = torch.tensor(
            [
                _slice_edges(int(count), num_slices, stream.generator(int(row)))
                for row, count in zip(canvas.row_ids, num_steps, strict=True)
            ],
            device=order.device,
        )  # (B, num_slices + 1)
        draws = []
        for low, high in zip(edges.T[:-1, :, None], edges.T[1:, :, None], strict=True):
            tokens = _mask_completion(rollouts, order >= low)
            draws.append(Draw(tokens, generated & (order >= low) & (order < high)))
        updates.append(InnerUpdate((*draws, *extra), generated | hints))
    return updates


def _slice_edges(num_steps: int, num_slices: int, rng) -> list[int]:
    """0 = e_0 < e_1 < … = num_steps; edges repeat at the end (empty slices) when there are more slices than steps."""
    cuts = min(num_slices - 1, max(0, num_steps - 1))
    inside = sorted((1 + rng.permutation(max(0, num_steps - 1))[:cuts]).tolist())
    return [0, *inside, *[num_steps] * (num_slices - cuts)]


def _scored(rollouts: Rollouts, hint_mode: str) -> Tensor:
    """(B, L) bool: the completion positions that may be masked and scored."""
    frozen = rollouts.canvas.frozen
    return ~frozen if hint_mode == "condition" else torch.ones_like(frozen)


def _mask_completion(rollouts: Rollouts, where: Tensor) -> Tensor:
    """(B, T) the rolled-out tokens with [MASK] at the completion positions `where`."""
    canvas = rollouts.canvas
    completion = rollouts.completion.masked_fill(where, canvas.mask_id)
    return torch.cat([rollouts.tokens[:, : canvas.prompt_length], completion], 1)


def _restrict(update: InnerUpdate, within: Tensor) -> InnerUpdate:
    draws = tuple(replace(draw, score=draw.score & within) for draw in update.draws)
    return InnerUpdate(draws, update.counted & within)
