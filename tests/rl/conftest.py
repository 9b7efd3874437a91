"""A toy policy and toy records, small enough to follow by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from igpo.canvas import masked_canvases
from igpo.config import RolloutConfig
from igpo.types import Canvas, Graded, Policy, Prompt, Rollouts

VOCAB, MASK, EOS, PAD = 13, 12, 11, 10
LENGTH, GROUP = 16, 4
ROLLOUT = RolloutConfig(
    max_completion_length=LENGTH, block_length=8, diffusion_steps=8, temperature=1.0, early_stop=False,
    use_cache=False,
)  # fmt: skip


class ToyPolicy(nn.Module):
    """Every position sees its own token, its position and the mean of all tokens: bidirectional, and cheap."""

    def __init__(self, width: int = 10, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: nn.Parameter(  # noqa: E731
            torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        )
        self.embedding, self.place = draw(VOCAB, width), draw(64, width)
        self.mix, self.weight, self.bias = draw(width, width), draw(VOCAB, width), draw(VOCAB)
        with torch.no_grad():
            self.bias[MASK] = -30.0  # a trained model never predicts [MASK]
        self.forwards: list[Tensor] = []  # the tokens of every call

    def hidden(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        assert attention_mask is not None
        assert position_ids is not None
        self.forwards.append(tokens)
        embedded = self.embedding[tokens]
        seen = attention_mask[..., None].to(embedded.dtype)
        context = (embedded * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True)
        return torch.tanh((embedded + self.place[position_ids] + 2 * context) @ self.mix)

    @property
    def head_weight(self) -> Tensor:
        return self.weight

    @property
    def head_bias(self) -> Tensor | None:
        return self.bias


class BlockToyPolicy(ToyPolicy):
    """The same mean, over the blocks up to a position's own."""

    block_length = ROLLOUT.block_length

    def hidden(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        return self.hidden_of_blocks(tokens, tokens, attention_mask, position_ids)

    def hidden_of_blocks(
        self, noisy: Tensor, clean: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:  # fmt: skip
        assert attention_mask is not None
        assert position_ids is not None
        self.forwards.append(noisy)
        block, real = position_ids // self.block_length, attention_mask[:, None]
        own = ((block[:, None] == block[..., None]) & real).to(self.mix.dtype)
        before = ((block[:, None] < block[..., None]) & real).to(self.mix.dtype)
        total = own @ self.embedding[noisy] + before @ self.embedding[clean]
        context = total / (own + before).sum(-1, keepdim=True).clamp(min=1)
        return torch.tanh(
            (self.embedding[noisy] + self.place[position_ids] + 2 * context) @ self.mix
        )


def prompts(count: int = 3, *, hint_length: int = 12) -> list[Prompt]:
    """Prompts of different lengths; the traces are LENGTH - 2 tokens long, the answer comes after hint_length."""
    return [
        Prompt(
            text=f"problem {i}",
            ids=tuple(range(1, 3 + i)),
            row_id=100 + i,
            answer="1",
            trace="worked",
            trace_ids=tuple((3 * k + i) % 10 for k in range(LENGTH - 2)),
            hint_length=hint_length,
        )
        for i in range(count)
    ]


def canvas(problems: Sequence[Prompt], generations: int = GROUP) -> Canvas:
    return masked_canvases(
        problems, num_generations=generations, completion_length=LENGTH, mask_id=MASK, pad_id=PAD,
        eos_id=EOS,
    )  # fmt: skip


def rolled(start: Canvas, seed: int = 0) -> Rollouts:
    """Rollouts of random tokens, as if committed left to right, two a step."""
    generator = torch.Generator().manual_seed(seed)
    completion = torch.randint(0, 10, start.frozen.shape, generator=generator)
    completion = torch.where(start.frozen, start.completion, completion)
    order = (torch.arange(LENGTH) // 2).expand_as(completion).masked_fill(start.frozen, -1)
    zeros = torch.zeros(completion.shape)
    return Rollouts(
        canvas=start,
        tokens=torch.cat([start.tokens[:, : start.prompt_length], completion], 1),
        step_map=order,
        commit_logprob=zeros,
        commit_entropy=zeros,
        num_steps=torch.full((len(completion),), LENGTH // 2),
        num_forwards=len(completion) * LENGTH // 2,
    )


def graded(rollouts: Rollouts, correct: Tensor, rewards: Tensor | None = None) -> Graded:
    return Graded(
        rollouts=rollouts,
        rewards=correct.float() if rewards is None else rewards,
        correct=correct,
        rescued=torch.zeros_like(correct),
        completions=tuple(str(row.tolist()) for row in rollouts.completion),
        parts={"correctness": correct.float()},
        metrics={"reward": 0.5},
    )


def grader(is_correct: Callable[[Rollouts], Tensor]):
    """A grade function whose verdict is `is_correct(rollouts)`, and which remembers what it was shown."""

    def grade(rollouts: Rollouts, problems: Sequence[Prompt]) -> Graded:
        grade.seen.append(rollouts)
        return graded(rollouts, is_correct(rollouts))

    grade.seen = []
    return grade


def logprobs(policy: Policy, start: Canvas, tokens: Tensor) -> Tensor:
    """(B, L, V) log-softmax of the policy on `tokens`, by plain torch."""
    hidden = policy.hidden(tokens, start.attention_mask, start.position_ids)
    logits = hidden[:, start.prompt_length :] @ policy.head_weight.T + policy.head_bias
    return logits.log_softmax(-1)


@pytest.fixture
def toy() -> SimpleNamespace:
    """The toy world: ToyPolicy, prompts, canvas, rolled, graded, grader, logprobs and its constants."""
    return SimpleNamespace(
        Policy=ToyPolicy, BlockPolicy=BlockToyPolicy, prompts=prompts, canvas=canvas, rolled=rolled,
        graded=graded, grader=grader, logprobs=logprobs, rollout=ROLLOUT, mask=MASK, eos=EOS,
        pad=PAD, vocab=VOCAB, length=LENGTH, group=GROUP,
    )  # fmt: skip
