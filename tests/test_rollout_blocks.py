"""Rollouts of block-causal policies: in the policy's own blocks, with and without keys and values kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from public_configs import MASK, PAD, public_model
from torch import Tensor

from igpo.canvas import masked_canvases, with_hints
from igpo.config import RolloutConfig
from igpo.models import MaskedDecoder
from igpo.rollout import denoise
from igpo.types import GIVEN, Canvas, Prompt, Seed

EOS, L = 2, 8
CFG = RolloutConfig(
    max_completion_length=L, block_length=4, diffusion_steps=8, temperature=0.0, early_stop=False
)
LENGTHS = (6, 8, 3, 5)


@pytest.fixture(scope="module")
def policy() -> MaskedDecoder:
    return public_model("sdar").double()  # float64: rounding decides no tie


def canvases(
    lengths: tuple[int, ...] = LENGTHS, num_generations: int = 2, first: int = 0
) -> Canvas:
    prompts = [
        Prompt("", tuple((torch.arange(n) * 13 % 90 + 10).tolist()), row_id=first + i)
        for i, n in enumerate(lengths)
    ]
    return masked_canvases(
        prompts,
        num_generations=num_generations,
        completion_length=L,
        mask_id=MASK,
        pad_id=PAD,
        eos_id=EOS,
    )


def by_hand(policy: MaskedDecoder, prompt: Tensor) -> Tensor:
    """Greedy, one token a step: block after block of the sequence, which ends with the block."""
    tokens = torch.cat((prompt, torch.full((L,), MASK)))
    for start in range(0, len(tokens), 4):
        here = tokens[: start + 4].clone()
        while (here == MASK).any():
            logits = policy(here[None]).logits[0]
            logits[:, MASK] = -torch.inf
            best = logits.softmax(-1).max(-1)
            place = best.values.masked_fill(here != MASK, -1).argmax()
            here[place] = best.indices[place]
        tokens[: start + 4] = here
    return tokens[len(prompt) :]


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_matches_the_description(policy: MaskedDecoder, use_cache: bool) -> None:
    canvas = canvases(num_generations=1)
    rollouts = denoise(policy, canvas, replace(CFG, use_cache=use_cache), Seed(0))
    for row, prompt in enumerate(LENGTHS):
        alone = by_hand(policy, canvas.tokens[row, -L - prompt : -L])
        assert torch.equal(rollouts.completion[row], alone)
        blocks = (torch.arange(L) + prompt % 4) // 4
        assert torch.equal(rollouts.step_map[row] // 4, blocks)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_the_cache_changes_nothing(policy: MaskedDecoder, temperature: float, steps: int) -> None:
    canvas = canvases()
    hint = torch.zeros(len(canvas.tokens), L, dtype=torch.bool)
    hint[1, 2:7], hint[4] = True, True
    canvas = with_hints(canvas, torch.full_like(canvas.completion, 77), hint)
    cfg = replace(CFG, temperature=temperature, diffusion_steps=steps, rollout_batch_size=3)
    cached, plain = (
        denoise(policy, canvas, replace(cfg, use_cache=on), Seed(5)) for on in (True, False)
    )
    for name in ("tokens", "step_map", "num_steps"):
        assert torch.equal(getattr(cached, name), getattr(plain, name)), name
    torch.testing.assert_close(cached.commit_logprob, plain.commit_logprob)
    torch.testing.assert_close(cached.commit_entropy, plain.commit_entropy)
    assert (cached.tokens != MASK).all()
    assert (cached.step_map[4] == GIVEN).all()


def test_rows_do_not_depend_on_their_company(policy: MaskedDecoder) -> None:
    cfg = replace(CFG, temperature=1.0)
    together = denoise(policy, canvases(), cfg, Seed(1))
    for i, length in enumerate(LENGTHS):
        alone = denoise(policy, canvases((length,), first=i), cfg, Seed(1))
        assert torch.equal(alone.completion, together.completion[2 * i : 2 * i + 2])


def test_only_the_current_block_is_computed(policy: MaskedDecoder) -> None:
    seen: list[tuple[int, ...]] = []
    handle = policy.embed_tokens.register_forward_hook(
        lambda _, args, __: seen.append(args[0].shape)
    )
    rollouts = denoise(policy, canvases((8, 8), 1), replace(CFG, diffusion_steps=4), Seed(0))
    handle.remove()
    # the prompt, two steps, the finished block, two steps
    assert seen == [(2, 8), (2, 4), (2, 4), (2, 4), (2, 4), (2, 4)]
    assert rollouts.num_forwards == 12


@pytest.mark.parametrize("ends_turn", [False, True])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_stops_after_the_block_that_ends_it(
    policy: MaskedDecoder, use_cache: bool, ends_turn: bool
) -> None:
    canvas = canvases((6, 8), 1)
    cfg = replace(CFG, use_cache=use_cache)
    full = denoise(policy, canvas, cfg, Seed(0))
    stop = int(full.completion[0, 1])  # what the policy says at the second place is called EOS
    assert stop not in full.completion[1].tolist()
    other = {"stop_token_ids": frozenset({stop})} if ends_turn else {"eos_id": stop}
    eos = EOS if ends_turn else stop
    stopped = denoise(policy, replace(canvas, **other), replace(cfg, early_stop=True), Seed(0))
    assert torch.equal(
        stopped.completion[0, :2], full.completion[0, :2]
    )  # 6 + 2 tokens: two blocks
    assert (stopped.completion[0, 2:] == eos).all()
    assert stopped.num_steps.tolist() == [4, 8]
    assert (stopped.step_map[0, 2:] == 4).all()
    assert torch.equal(stopped.completion[1], full.completion[1])


def test_blocks_must_be_the_policys(policy: MaskedDecoder) -> None:
    with pytest.raises(
        ValueError, match=r"must be the policy's own, 4, got 8\. Set block_length=4"
    ):
        denoise(policy, canvases(), replace(CFG, block_length=8), Seed(0))
