"""Prefix and dual cache of full-attention policies: what is exact, and what is not against a loop by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from frozen import by_hand, computed
from public_configs import MASK as PUBLIC_MASK
from public_configs import PAD as PUBLIC_PAD
from public_configs import public_model
from toys import MASK, Scripted, canvases, hinted, rolled_alike, small_decoder

from igpo.canvas import masked_canvases, with_hints
from igpo.config import AlgorithmConfig, RolloutConfig
from igpo.models import MaskedDecoder
from igpo.rl.algorithms import build_algorithm
from igpo.rollout import denoise
from igpo.types import GIVEN, Canvas, Prompt, Rollouts, Seed

CFG = RolloutConfig(
    max_completion_length=16, block_length=8, diffusion_steps=8, temperature=0.8, early_stop=False
)
KINDS = ["prefix", "dual"]
RULES = {
    "schedule": CFG,
    "threshold": replace(CFG, diffusion_steps=16, threshold=0.15),
    "stable": replace(CFG, diffusion_steps=16, threshold=0.1, kl_threshold=0.5, kl_history=1),
    "dream": replace(CFG, unmask_schedule="dream", remasking="entropy"),
    "rcr": replace(CFG, remasking="rcr"),
    "early stop": replace(CFG, block_length=2, early_stop=True, temperature=1.5),
}


@pytest.fixture(scope="module")
def decoder() -> MaskedDecoder:
    return small_decoder()


def public_canvases() -> Canvas:
    """Of the public families' vocabulary: prompts of 5, 8 and 3 tokens, 12 to complete, hints in the second row."""
    prompts = [Prompt("", tuple(range(10, 10 + n)), row_id=n) for n in (5, 8, 3)]
    canvas = masked_canvases(
        prompts, num_generations=1, completion_length=12, mask_id=PUBLIC_MASK, pad_id=PUBLIC_PAD
    )
    hint = torch.zeros(3, 12, dtype=torch.bool)
    hint[1, 3:6] = True
    return with_hints(canvas, torch.full((3, 12), 77), hint)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llada-grouped-tied", "dream"])
def test_matches_a_loop_over_frozen_keys(kind: str, family: str) -> None:
    """Greedy, one token a step, float64; of a shifted model the column before the block is computed too."""
    policy, canvas = public_model(family).double(), public_canvases()
    cfg = RolloutConfig(
        12, block_length=4, diffusion_steps=12, temperature=0.0, approximate_cache=kind
    )
    rollouts, lead = denoise(policy, canvas, cfg, Seed(0)), int(policy.config.shifted)
    for b, prompt in enumerate((5, 8, 3)):
        tokens, first = canvas.tokens[b, 8 - prompt :].clone(), prompt
        positions = torch.arange(len(tokens))
        steps, logprob = torch.full((12,), GIVEN), torch.zeros(12, dtype=torch.float64)
        for block in range(3):
            start = first + 4 * block
            frozen, tick = computed(policy, tokens, positions), 4 * block
            stop = start + 4 if kind == "dual" else len(tokens)
            window = torch.arange(start - lead, stop)
            while (masked := tokens[start : start + 4] == PUBLIC_MASK).any():
                states, _ = by_hand(policy, tokens, positions, frozen, window)
                logits = states[:4] @ policy.head_weight.T
                logits[:, PUBLIC_MASK] = -torch.inf
                logp = logits.log_softmax(-1)
                best = logp.max(-1)
                place = int(best.values.masked_fill(~masked, -torch.inf).argmax())
                tokens[start + place] = best.indices[place]
                steps[4 * block + place], logprob[4 * block + place] = tick, best.values[place]
                tick += 1
        assert torch.equal(rollouts.completion[b], tokens[first:])
        assert torch.equal(rollouts.step_map[b], steps)
        torch.testing.assert_close(rollouts.commit_logprob[b].double(), logprob, rtol=0, atol=1e-6)


def same(a: Rollouts, b: Rollouts) -> bool:
    return all(
        torch.equal(getattr(a, x), getattr(b, x))
        for x in ("tokens", "step_map", "commit_logprob", "commit_entropy", "num_steps")
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llada", "dream", "llada-moe"])
def test_one_step_a_block_is_exact(kind: str, family: str) -> None:
    policy, canvas = public_model(family), public_canvases()
    cfg = RolloutConfig(12, block_length=4, diffusion_steps=3, temperature=1.0)
    exact = denoise(policy, canvas, cfg, Seed(2))
    assert same(denoise(policy, canvas, replace(cfg, approximate_cache=kind), Seed(2)), exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["mmada", "dream"])
def test_a_block_of_the_whole_canvas_is_exact(kind: str, family: str) -> None:
    policy, canvas = public_model(family), public_canvases()
    bare = Canvas(
        canvas.completion, canvas.attention_mask[:, 8:], torch.arange(12).expand(3, -1), canvas.frozen,
        canvas.row_ids, canvas.group_ids, 0, canvas.mask_id, None,
    )  # fmt: skip
    cfg = RolloutConfig(12, block_length=12, diffusion_steps=12, temperature=1.0)
    exact = denoise(policy, bare, cfg, Seed(2))
    found = denoise(policy, bare, replace(cfg, approximate_cache=kind), Seed(2))
    assert torch.equal(found.tokens, exact.tokens)
    assert torch.equal(found.step_map, exact.step_map)
    torch.testing.assert_close(found.commit_logprob, exact.commit_logprob, rtol=0, atol=1e-5)


def test_with_one_block_the_two_are_one_and_otherwise_not(decoder: MaskedDecoder) -> None:
    canvas = hinted(canvases())
    for block_length, equal in ((16, True), (8, False)):
        cfg = replace(CFG, block_length=block_length)
        exact, prefix, dual = (
            denoise(decoder, canvas, replace(cfg, approximate_cache=kind), Seed(1))
            for kind in ("none", *KINDS)
        )
        assert torch.equal(prefix.tokens, dual.tokens) == equal
        assert not torch.equal(prefix.tokens, exact.tokens)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("schedule", "dual"), ("threshold", "prefix"), ("threshold", "dual"), ("stable", "dual"),
        ("dream", "prefix"), ("rcr", "dual"), ("early stop", "prefix"),
    ],
)  # fmt: skip
def test_rows_depend_on_themselves_and_the_seed(
    decoder: MaskedDecoder, name: str, kind: str
) -> None:
    canvas, cfg = hinted(canvases()), replace(RULES[name], approximate_cache=kind)
    if (
        name == "early stop"
    ):  # what is often drawn is called EOS, so that rows leave at different times
        canvas = replace(
            canvas, eos_id=int(denoise(decoder, canvas, cfg, Seed(7)).completion.mode().values[0])
        )
    whole = rolled_alike(decoder, canvas, cfg)
    assert (whole.completion != MASK).all()
    assert torch.equal(whole.completion[canvas.frozen], canvas.completion[canvas.frozen])
    if name == "early stop":
        assert len(set(whole.num_steps.tolist())) > 1


def test_only_the_window_is_computed(decoder: MaskedDecoder) -> None:
    seen: list[tuple[int, ...]] = []
    handle = decoder.embed_tokens.register_forward_hook(
        lambda _, args, __: seen.append(args[0].shape)
    )
    canvas, cfg = canvases(generations=8), replace(CFG, diffusion_steps=4)
    total = canvas.tokens.shape[1]
    for kind, widths in (("prefix", (16, 8)), ("dual", (8, 8))):
        rollouts = denoise(decoder, canvas, replace(cfg, approximate_cache=kind), Seed(0))
        assert rollouts.num_forwards == 24 * 4
        windows = [shape for shape in seen if shape in [(24, w) for w in widths]]
        assert windows == [(24, w) for w in widths]
        assert len(seen) == 4
        seen.clear()
    handle.remove()
    assert total == 21


def test_what_cannot_be_cached_is_refused(decoder: MaskedDecoder) -> None:
    cases: list[tuple[Any, dict, str]] = [
        (decoder, {"approximate_cache": "both"}, "must be one of none, prefix, dual, got 'both'"),
        (
            decoder,
            {"cfg_scale": 1.0},
            r"must be none with cfg_scale=1\.0, which looks at two canvases",
        ),
        (decoder, {"cuda_graphs": "on"}, "must be none with cuda_graphs=on, which records whole"),
        (Scripted(torch.zeros(6, 16, 23)), {}, "must be none with a policy that keeps no keys"),
        (public_model("sdar"), {"block_length": 4}, "must be none with a block-causal policy"),
    ]
    for policy, change, message in cases:
        with pytest.raises(ValueError, match=message):
            denoise(
                policy, canvases(), replace(CFG, **{"approximate_cache": "dual"} | change), Seed(0)
            )


def test_training_on_its_rollouts_is_a_choice() -> None:
    cfg, rollout = AlgorithmConfig(algorithm="grpo"), replace(CFG, approximate_cache="prefix")

    def build(cfg: AlgorithmConfig) -> None:
        build_algorithm(cfg, rollout, lambda rollouts, prompts: rollouts, pad_id=0)  # type: ignore[arg-type, return-value]

    with pytest.raises(ValueError, match=r"must be 'none'.* Set approximate_rollouts=true"):
        build(cfg)
    build(replace(cfg, approximate_rollouts=True))
