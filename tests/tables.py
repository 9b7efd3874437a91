"""A policy that is a table of logits, one per canvas: so small that every canvas, order and sequence can be listed."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from igpo.canvas import masked_canvases
from igpo.types import Draw, Graded, Prompt, Rollouts

WORDS, MASK, EOS, PAD, VOCAB = 2, 2, 3, 4, 5  # tokens 0 and 1 are the words


class TablePolicy(nn.Module):
    """(VOCAB^length canvases, length, words) logits in float64; other tokens have probability 0."""

    head_bias = None

    def __init__(self, length: int, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = (3**length, length, WORDS)
        self.table = nn.Parameter(
            scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        )
        self.length, self.head_weight = length, torch.eye(VOCAB, dtype=torch.float64)

    def hidden(self, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        completion = tokens[:, -self.length :].clamp(max=MASK)
        code = (completion * 3 ** torch.arange(self.length)).sum(1)
        rest = torch.full((len(tokens), self.length, VOCAB - WORDS), -1e9, dtype=torch.float64)
        logits = torch.cat([self.table[code], rest], -1)
        prompt = torch.zeros(len(tokens), tokens.shape[1] - self.length, VOCAB, dtype=torch.float64)
        return torch.cat([prompt, logits], 1)

    def logp(self, completion: Tensor, hidden: Tensor) -> Tensor:
        """(B, L) log p of the completion on the canvas that masks `hidden` ((L,) or (B, L) bool)."""
        canvas = torch.where(hidden, MASK, completion)
        code = (canvas * 3 ** torch.arange(self.length)).sum(1)
        return self.table[code].log_softmax(-1).gather(-1, completion[..., None])[..., 0]


def sequences(length: int) -> Tensor:
    """(2^length, length) every completion."""
    return torch.tensor(list(itertools.product(range(WORDS), repeat=length)))


def subsets(length: int) -> list[Tensor]:
    """Every non-empty (L,) bool mask."""
    return [
        torch.tensor(bits) for bits in itertools.product([False, True], repeat=length) if any(bits)
    ]


def chance(mask: Tensor) -> float:
    """P(S) for l ~ U{1..L} and S uniform among the sets of size l."""
    length, size = len(mask), int(mask.sum())
    ways = torch.lgamma(
        torch.tensor([length + 1.0, size + 1.0, length - size + 1.0], dtype=torch.float64)
    )
    return float(torch.exp(ways[1] + ways[2] - ways[0])) / length


def elbo(policy: TablePolicy, completion: Tensor) -> Tensor:
    """(B,) the ELBO: sum over S of P(S) (L/l) sum_{k in S} log p(o^k | z_S)."""
    length = completion.shape[1]
    return sum(
        chance(S) * length / int(S.sum()) * (policy.logp(completion, S) * S).sum(1)
        for S in subsets(length)
    )  # type: ignore[return-value]


def chain(policy: TablePolicy, completion: Tensor, order: tuple[int, ...]) -> Tensor:
    """(B,) sum_j log p(o^{order_j} | what came before)."""
    hidden, total = torch.ones(completion.shape[1], dtype=torch.bool), 0.0
    for position in order:
        total = total + policy.logp(completion, hidden)[:, position]
        hidden = hidden.clone()
        hidden[position] = False
    return total  # type: ignore[return-value]


def orders(length: int) -> list[tuple[int, ...]]:
    return list(itertools.permutations(range(length)))


def exhaustive(completion: Tensor) -> tuple[Draw, ...]:
    """Every S as a draw weighted P(S) L/l: what the Monte Carlo estimate converges to."""
    size, length = completion.shape
    draws = []
    for S in subsets(length):
        masked = S.expand(size, length)
        weight = torch.full((size, length), chance(S) * length / int(S.sum()), dtype=torch.float64)
        prompt = torch.zeros(size, 1, dtype=torch.bool)
        draws.append(Draw(torch.cat([prompt, masked], 1), masked, weight))
    return tuple(draws)


def rolled(completion: Tensor, step_map: Tensor | None = None, *, groups: int = 1) -> Rollouts:
    """Rollouts with these completions, in `groups` groups; committed left to right unless told."""
    size, length = completion.shape
    prompts = [Prompt("", (0,), row_id=i) for i in range(groups)]
    canvas = masked_canvases(
        prompts, num_generations=size // groups, completion_length=length, mask_id=MASK, pad_id=PAD, eos_id=EOS
    )  # fmt: skip
    order = torch.arange(length).expand(size, length) if step_map is None else step_map
    zeros = torch.zeros(size, length, dtype=torch.float64)
    tokens = torch.cat([canvas.tokens[:, :1], completion], 1)
    return Rollouts(canvas, tokens, order, zeros, zeros, torch.full((size,), length), size * length)


def graded(rollouts: Rollouts, rewards: Tensor) -> Graded:
    none = torch.zeros(len(rewards), dtype=torch.bool)
    return Graded(rollouts, rewards, rewards > 0, none, tuple("" for _ in rewards))
