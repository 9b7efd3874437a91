"""The forms that public research code uses, written from their published descriptions, to be timed beside ours.

`denoise`: LLaDA's semi-autoregressive sampler (arXiv:2502.09992; the trainers of d1 and IGPO call the same): every
position of the canvas goes through the head, noise and softmax are float64, positions are chosen row by row.
`cached`: the approximate caches of Fast-dLLM (arXiv:2505.22618, section 3.2), with our head and commit.
`train`: an update of diffu-GRPO and IGPO (arXiv:2504.12216, arXiv:2509.10396): logits of every position, log_softmax in
float32 and gather, old and reference log-probs of every inner update by forwards of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from igpo.ops import unmask_step
from igpo.ops._head import head_logits
from igpo.rollout import transfer_schedule
from igpo.types import Canvas, take


def full_logits(policy, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
    """(B, T, V) of every position, in the model's dtype."""
    return F.linear(policy.hidden(tokens, attention_mask, position_ids), policy.head_weight)


def noisy(logits: Tensor, temperature: float) -> Tensor:
    """What the argmax is taken of: exp(x) / (-log u)^T, whose argmax is a draw from softmax(x / T)."""
    if temperature == 0:
        return logits
    wide = logits.double()
    noise = (-torch.log(torch.rand_like(wide))) ** temperature
    return wide.exp() / noise


@torch.no_grad()
def denoise(
    policy, canvas: Canvas, *, block: int, steps: int, temperature: float, group: int, first: int = 0,
    most: int | None = None,
) -> Tensor:  # fmt: skip
    """(B, T) tokens after the steps from block `first` on, at most `most` of them; `group` rows at a time."""
    parts = torch.arange(len(canvas.tokens), device=canvas.tokens.device).split(group)
    done = [
        _denoise(policy, take(canvas, rows), block, steps, temperature, first, most)
        for rows in parts
    ]
    return torch.cat(done)


def _denoise(
    policy, canvas: Canvas, block: int, steps: int, temperature: float, first: int, most: int | None
) -> Tensor:
    tokens, length = canvas.tokens.clone(), canvas.completion.shape[1]
    done = 0
    for begin in range(canvas.prompt_length + first * block, tokens.shape[1], block):
        inside = tokens[:, begin : begin + block] == canvas.mask_id
        counts = [transfer_schedule(int(n), steps * block // length) for n in inside.sum(1)]
        for quota in zip(*counts, strict=True):
            if done == most:
                return tokens
            _step(policy, canvas, tokens, begin + block, quota, temperature)
            done += 1
    return tokens


def _step(policy, canvas: Canvas, tokens: Tensor, end: int, quota, temperature: float) -> None:
    logits = full_logits(policy, tokens, canvas.attention_mask, canvas.position_ids)
    candidate = noisy(logits, temperature).argmax(-1)
    p = F.softmax(logits.double(), -1)
    confidence = p.gather(-1, candidate[..., None])[..., 0]
    confidence[:, end:] = -torch.inf
    masked = tokens == canvas.mask_id
    confidence = torch.where(masked, confidence, -torch.inf)
    chosen = torch.zeros_like(masked)
    for row, count in enumerate(quota):
        chosen[row, confidence[row].topk(count).indices] = True
    tokens[chosen] = candidate[chosen]


@torch.no_grad()
def cached(
    policy, canvas: Canvas, *, block: int, steps: int, temperature: float, dual: bool, first: int = 0,
    most: int | None = None,
) -> Tensor:  # fmt: skip
    """(B, T) tokens as `denoise`, where a block's first step computes the whole canvas and keeps keys and values.

    The later steps compute the block and what follows it beside the keys of what stands before (dual: the block alone,
    beside the keys of everything else).
    """
    tokens, length = canvas.tokens.clone(), canvas.completion.shape[1]
    per_block, size = steps * block // length, tokens.shape[1]
    tick = 0
    for begin in range(canvas.prompt_length + first * block, size, block):
        end = begin + block
        cache, place = None, slice(0, size)
        for step, quota in enumerate(transfer_schedule(block, per_block)):
            if tick == most:
                return tokens
            if step == 0:
                cache = policy.new_cache(len(tokens), size)
            mask, positions = canvas.attention_mask[:, place], canvas.position_ids[:, place]
            hidden = policy.hidden(tokens[:, place], mask, positions, cache=cache, store=step == 0)
            _commit(policy, canvas, tokens, hidden, (begin, end, place.start), quota, temperature, tick)  # fmt: skip
            if step == 0:
                cut(cache, begin, end if dual else size)
                place = slice(begin, end if dual else size)
            tick += 1
    return tokens


def cut(cache, begin: int, end: int) -> None:
    """Forgets the tokens from begin to end: those that are computed again. Keys are rotated, so their order is free."""
    for name, axis in (("keys", 3), ("values", 3), ("real", 1), ("blocks", 1)):
        x = getattr(cache, name)
        rest = x.narrow(axis, end, cache.length - end)
        room = x.narrow(axis, 0, end - begin)  # written over by the tokens computed anew
        setattr(cache, name, torch.cat((x.narrow(axis, 0, begin), rest, room), axis))
    cache.length -= end - begin


def _commit(
    policy, canvas: Canvas, tokens: Tensor, hidden: Tensor, where: tuple[int, int, int], quota: int,
    temperature: float, tick: int,
) -> None:  # fmt: skip
    begin, end, offset = where
    inside = tokens[:, begin:end]
    left = int((inside[0] == canvas.mask_id).sum())  # the same in every row
    place = (inside == canvas.mask_id).byte().argsort(dim=1, descending=True, stable=True)[:, :left]
    states = hidden[torch.arange(len(tokens))[:, None], place + (begin - offset)]
    result = unmask_step(
        head_logits(states, policy.head_weight), inside.gather(1, place), mask_id=canvas.mask_id, num_unmask=quota,
        temperature=temperature, seed=1, step=tick, row_ids=canvas.row_ids,
    )  # fmt: skip
    inside.scatter_(1, place, result.tokens)


def logprob(policy, canvas: Canvas, tokens: Tensor, masked: Tensor) -> Tensor:
    """(B, L) of the completion, on the canvas where `masked` is hidden: float32 log_softmax at every position of it."""
    hidden_tokens = tokens.masked_fill(masked, canvas.mask_id)
    logits = full_logits(policy, hidden_tokens, canvas.attention_mask, canvas.position_ids)
    logits = logits[:, canvas.prompt_length :]
    targets = tokens[:, canvas.prompt_length :]
    return F.log_softmax(logits.float(), -1).gather(-1, targets[..., None])[..., 0]


def loss_of(
    value: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, epsilon: float, beta: float
) -> Tensor:
    """Sum over sequences of the sequence-ratio (GSPO) clipped surrogate and the k3 KL, each a mean over tokens."""
    ratio = (value - old).mean(1).exp()
    surrogate = torch.minimum(
        ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages
    )
    delta = ref - value
    kl = (delta.exp() - delta - 1).mean(1)
    return (beta * kl - surrogate).sum()


def train(
    policy, reference: Callable[[], AbstractContextManager], canvas: Canvas, tokens: Tensor, advantages: Tensor,
    masks: list[Tensor], micro: int, *, epsilon: float, beta: float,
) -> Iterator[float]:  # fmt: skip
    """The loss of each inner update, whose gradient is there when it is given; masks: of each, (B, T) bool."""
    parts = torch.arange(len(tokens), device=tokens.device).split(micro)

    def scored() -> list[Tensor]:
        with torch.no_grad():
            return [
                torch.cat([logprob(policy, take(canvas, p), tokens[p], mask[p]) for p in parts])
                for mask in masks
            ]

    old = scored()
    with reference():
        ref = scored()
    for inner, mask in enumerate(masks):
        total = 0.0
        for p in parts:
            value = logprob(policy, take(canvas, p), tokens[p], mask[p])
            loss = loss_of(value, old[inner][p], ref[inner][p], advantages[p], epsilon, beta)
            loss = loss / len(tokens)
            loss.backward()
            total += float(loss.detach())
        yield total
