"""Classifier-free guidance and deferred tokens, against a loop written from their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from public_configs import public_model
from torch import Tensor
from toys import MASK, VOCAB, Scripted, canvases, hinted, small_decoder

from igpo.config import RolloutConfig
from igpo.models import MaskedDecoder
from igpo.rollout import denoise
from igpo.types import GIVEN, Canvas, Seed, take

CFG = RolloutConfig(
    max_completion_length=16, block_length=8, diffusion_steps=8, temperature=0.0, early_stop=False
)


@pytest.fixture(scope="module")
def decoder() -> MaskedDecoder:
    return small_decoder()


def frequent(decoder: MaskedDecoder) -> tuple[int, int]:
    """The two tokens the policy commits most, so that deferring them matters."""
    found = (
        denoise(decoder, canvases(), CFG, Seed(0)).completion.flatten().bincount(minlength=VOCAB)
    )
    first, second = found.topk(2).indices.tolist()
    return first, second


def greedy(policy: MaskedDecoder, canvas: Canvas, cfg: RolloutConfig) -> tuple[Tensor, Tensor]:
    """One sequence, two positions a step: (completion, step of each position)."""
    start, tokens = canvas.prompt_length, canvas.tokens[0].clone()
    given = (tokens != MASK) & canvas.attention_mask[0]
    steps = torch.full((16,), GIVEN)
    for block in range(2):
        inside = [start + i for i in range(8 * block, 8 * block + 8)]
        todo = sum(int(tokens[i]) == MASK for i in inside)
        for step in range(4):
            free = torch.where(given, MASK, tokens)
            c, u = (
                policy(x[None], canvas.attention_mask, canvas.position_ids).logits[0].double()
                for x in (tokens, free)
            )
            logits = u + (cfg.cfg_scale + 1) * (c - u)
            logits[:, MASK] = -torch.inf
            p, best = logits.softmax(-1).max(-1)
            open_ = [i for i in inside if tokens[i] == MASK]
            late = [int(token) in cfg.defer_tokens for token in best]
            # deferred ones all have score -inf: left to right
            score = [0.0 if late[i] else 1 + float(p[i]) for i in range(len(late))]
            open_.sort(key=lambda i: -score[i])
            for i in open_[: todo // 4 + (step < todo % 4)]:
                tokens[i], steps[i - start] = best[i], 4 * block + step
    return tokens[start:], steps


@pytest.mark.parametrize("scale", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("deferred", [False, True], ids=["", "deferred"])
def test_matches_the_definition(decoder: MaskedDecoder, scale: float, deferred: bool) -> None:
    cfg = replace(CFG, cfg_scale=scale, defer_tokens=frequent(decoder) if deferred else ())
    canvas = hinted(canvases())
    rollouts = denoise(decoder, canvas, cfg, Seed(0))
    for row in (0, 4, 7):
        with torch.no_grad():
            tokens, steps = greedy(decoder, take(canvas, torch.tensor([row])), cfg)
        assert torch.equal(rollouts.completion[row], tokens)
        assert torch.equal(rollouts.step_map[row], steps)
    plain = denoise(decoder, canvas, CFG, Seed(0))
    changed = not torch.equal(plain.step_map, rollouts.step_map)
    assert changed == (scale > 0 or deferred)
    assert rollouts.num_forwards == plain.num_forwards * (2 if scale else 1)


@pytest.mark.parametrize("change", [{"cfg_scale": 1.0}, {"defer_tokens": (3, 5)}])
def test_rows_do_not_depend_on_company(decoder: MaskedDecoder, change: dict) -> None:
    cfg, canvas = replace(CFG, temperature=1.0, **change), hinted(canvases())
    whole = denoise(decoder, canvas, cfg, Seed(4))
    order = torch.tensor([8, 1, 5])
    some = denoise(decoder, take(canvas, order), replace(cfg, rollout_batch_size=2), Seed(4))
    assert torch.equal(some.tokens, whole.tokens[order])
    assert torch.equal(some.step_map, whole.step_map[order])


@pytest.mark.parametrize("rule", [{"threshold": 0.5}, {"entropy_bound": 1.0}, {"alg_temp": 0.2}])
def test_deferred_tokens_come_last_with_every_rule(rule: dict) -> None:
    """All positions are nearly certain; the first three of each block want the deferred token."""
    script = torch.zeros(4, 16, VOCAB)
    script[..., 3] = 30.0
    script[:, :3, 5] = script[:, 8:11, 5] = 60.0
    cfg = replace(CFG, diffusion_steps=16, defer_tokens=(5,), **rule)
    if "alg_temp" in rule:
        cfg = replace(cfg, remasking="maskgit_plus")
    rollouts = denoise(Scripted(script), canvases(ends=(1, 2, 3)), cfg, Seed(0))
    for first in (0, 8):
        steps = rollouts.step_map[:, first : first + 8]
        assert (rollouts.completion[:, first : first + 3] == 5).all()
        assert (steps[:, :3].amin(1) > steps[:, 3:].amax(1)).all()


def test_contradictions_are_refused(decoder: MaskedDecoder) -> None:
    for change, message in (
        ({"cfg_scale": -0.5}, r"cfg_scale must be finite and >= 0, got -0\.5"),
        ({"defer_tokens": (VOCAB,)}, r"defer_tokens must be in \[0, 23\), got \(23,\)"),
        ({"defer_tokens": (3,), "suppress_tokens": (3,)}, r"must not be suppressed too, got \[3\]"),
        ({"defer_tokens": (3,), "remasking": "origin"}, "defer_tokens must be empty with"),
    ):
        with pytest.raises(ValueError, match=message):
            denoise(decoder, canvases(), replace(CFG, **change), Seed(0))
    causal = public_model("sdar")
    with pytest.raises(ValueError, match=r"cfg_scale must be 0 .* Set use_cache=false"):
        denoise(causal, canvases(), replace(CFG, block_length=4, cfg_scale=1.0), Seed(0))
