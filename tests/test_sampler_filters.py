"""Top-k, top-p and min-p in a rollout: what can be drawn, how often, and the support that is recorded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toys import MASK, VOCAB, Scripted, before_step, canvases, hinted, small_decoder

from igpo.canvas import masked_canvases
from igpo.config import RolloutConfig
from igpo.rollout import denoise
from igpo.types import GIVEN, Prompt, Rollouts, Seed, put, take

CFG = RolloutConfig(
    max_completion_length=16, block_length=8, diffusion_steps=8, temperature=1.3, early_stop=False
)
CASES = {
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.4},
    "min_p": {"min_p": 0.5},
    "all": {"top_k": 9, "top_p": 0.7, "min_p": 0.2, "suppress_tokens": (3, 4)},
}


def support(logits: Tensor, cfg: RolloutConfig) -> list[int]:
    """The definition, for one position: ids by probability, cut by each rule."""
    logits = logits.double() / cfg.temperature
    logits[[MASK, *cfg.suppress_tokens]] = -torch.inf
    q = logits.softmax(-1).tolist()
    order = sorted((v for v in range(VOCAB) if q[v] > 0), key=lambda v: -q[v])
    kept, mass = [], 0.0
    for v in order:
        if mass < cfg.top_p and q[v] >= cfg.min_p * q[order[0]]:
            kept.append(v)
        mass += q[v]
    return kept[: cfg.top_k or None]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("remasking", ["random", "low_confidence"])
def test_commits_are_of_the_filtered_distribution(name: str, remasking: str) -> None:
    cfg = replace(CFG, remasking=remasking, **CASES[name])
    cfg = replace(cfg, record_support=cfg.top_k > 0)
    decoder, canvas = small_decoder(), hinted(canvases())
    rollouts = denoise(decoder, canvas, cfg, Seed(1))
    assert (rollouts.support is not None) == cfg.record_support
    for step in range(8):
        tokens = before_step(rollouts, step)
        with torch.no_grad():
            logits = decoder(tokens, canvas.attention_mask, canvas.position_ids).logits
        now = (rollouts.step_map == step).nonzero()[::3]
        for row, column in now.tolist():
            at = logits[row, canvas.prompt_length + column]
            kept = support(at, cfg)
            logq = (at[kept].double() / cfg.temperature).log_softmax(-1)
            place = kept.index(int(rollouts.completion[row, column]))
            assert abs(float(rollouts.commit_logprob[row, column] - logq[place])) < 2e-5
            entropy = float(-(logq * logq.exp()).sum())
            assert abs(float(rollouts.commit_entropy[row, column]) - entropy) < 2e-5
            if rollouts.support is not None:
                padding = [-1] * (cfg.top_k - len(kept))
                assert rollouts.support[row, column].tolist() == kept + padding


def test_draws_have_the_frequencies_of_the_renormalised_softmax() -> None:
    logits = torch.tensor([[1.0, 0.2, 0.9, -1.0, 0.5]])
    canvas = masked_canvases(
        [Prompt("", (0,), row_id=4)], num_generations=4000, completion_length=1, mask_id=7, pad_id=6
    )
    cfg = RolloutConfig(1, 1, 1, temperature=0.7, top_k=3, rollout_batch_size=4000)
    drawn = denoise(Scripted(logits[None]), canvas, cfg, Seed(3)).completion[:, 0]
    p = (logits[0, [0, 2, 4]].double() / 0.7).softmax(-1)
    counts = torch.bincount(drawn, minlength=5).double()
    assert counts[[1, 3]].sum() == 0
    expected = 4000 * p
    # 2 degrees of freedom: p about 3e-4
    assert float(((counts[[0, 2, 4]] - expected) ** 2 / expected).sum()) < 16


def test_support_is_of_committed_tokens_and_follows_its_row() -> None:
    cfg = replace(CFG, top_k=4, record_support=True)
    decoder, canvas = small_decoder(), hinted(canvases())
    whole = denoise(decoder, canvas, cfg, Seed(2))
    assert whole.support is not None
    given = whole.step_map == GIVEN
    assert (whole.support[given] == -1).all()
    assert (whole.support[~given] == whole.completion[~given][:, None]).any(1).all()
    order = torch.tensor([7, 0, 3])
    some: Rollouts = denoise(
        decoder, take(canvas, order), replace(cfg, rollout_batch_size=2), Seed(2)
    )
    assert some.support is not None
    assert torch.equal(some.support, whole.support[order])
    assert torch.equal(some.tokens, whole.tokens[order])
    back = put(whole, order, take(whole, order.roll(1)))
    assert torch.equal(back.support[7], whole.support[order.roll(1)[0]])


def test_at_their_defaults_and_without_effect_nothing_changes() -> None:
    decoder, canvas = small_decoder(), canvases()
    plain = denoise(decoder, canvas, CFG, Seed(2))
    wide = denoise(decoder, canvas, replace(CFG, top_k=VOCAB), Seed(2))
    wider = denoise(decoder, canvas, replace(CFG, top_k=VOCAB + 5, record_support=True), Seed(2))
    assert torch.equal(wider.tokens, wide.tokens)
    assert wider.support is not None
    assert (wider.support[..., VOCAB:] == -1).all()
    assert plain.support is None
    assert torch.equal(plain.tokens, wide.tokens)
    greedy = denoise(decoder, canvas, replace(CFG, temperature=0.0), Seed(2))
    narrow = denoise(decoder, canvas, replace(CFG, top_k=1), Seed(2))
    assert not torch.equal(greedy.tokens, plain.tokens)
    assert (narrow.commit_logprob == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": -1}, "top_k must not be negative, 0 for no limit, got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\]"),
        ({"top_p": 0.9, "record_support": True}, "record_support must come with top_k"),
    ],
)
def test_refuses_bad_values(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        denoise(small_decoder(), canvases(), replace(CFG, **change), Seed(0))
