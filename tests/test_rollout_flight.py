"""Finished rows leave the batch and waiting ones enter: nobody's records change, and no place stays empty."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from public_configs import MASK as SDAR_MASK
from public_configs import PAD as SDAR_PAD
from public_configs import public_model
from torch import Tensor
from toys import MASK, PAD, VOCAB, Scripted, canvases, early_script, hinted

from igpo.canvas import masked_canvases, with_hints
from igpo.config import RolloutConfig
from igpo.models import MaskedDecoder, MaskedDecoderConfig
from igpo.rollout import denoise
from igpo.rollout.flight import InFlight, working
from igpo.types import Canvas, Prompt, Rollouts, Seed

CFG = RolloutConfig(max_completion_length=16, block_length=4, diffusion_steps=8, temperature=0.8)


@pytest.fixture(scope="module")
def decoder() -> MaskedDecoder:
    """32 wide: a row's float32 products are the same bits in any company (igpo/models/layout.py)."""
    config = MaskedDecoderConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, mask_token_id=MASK, pad_token_id=PAD,
    )  # fmt: skip
    return MaskedDecoder.from_seed(config, 1)


def assert_same_bits(a: Rollouts, b: Rollouts) -> None:
    for name in ("tokens", "step_map", "num_steps", "commit_logprob", "commit_entropy", "support"):
        one, other = getattr(a, name), getattr(b, name)
        assert one is other is None or torch.equal(one, other), name
    assert a.num_forwards == b.num_forwards


class Spy:
    """A policy that writes down how many rows it is asked for."""

    def __init__(self, policy: Scripted | MaskedDecoder) -> None:
        self.policy, self.head_weight, self.head_bias = policy, policy.head_weight, None
        self.rows: list[int] = []

    def hidden(self, tokens: Tensor, attention_mask: Any, position_ids: Any) -> Tensor:
        self.rows.append(len(tokens))
        return self.policy.hidden(tokens, attention_mask, position_ids)


def test_the_batch_is_full_while_any_wait() -> None:
    spy, cfg = Spy(early_script()), replace(CFG, temperature=0.0)
    # of 8, 4, 2, 8, 2 and 4 steps: two places are busy for 14
    rollouts = denoise(
        spy, canvases(generations=1, ends=(0, 1, 2, 3, 2, 1)), replace(cfg, rollout_batch_size=2), Seed(0)
    )  # fmt: skip
    assert rollouts.num_steps.tolist() == [8, 4, 2, 8, 2, 4]
    assert spy.rows == [2] * 14


def test_rows_go_on_at_their_own_pace_where_a_rule_lets_them() -> None:
    """Prompt 1 is sure of every token, 0 of none: with a threshold blocks take one step and four."""
    script = torch.zeros(2, 16, VOCAB)
    script[1, :, 5] = 30.0
    spy = Spy(Scripted(script))
    cfg = replace(CFG, diffusion_steps=16, threshold=0.9, rollout_batch_size=2)
    rollouts = denoise(spy, canvases(generations=1, ends=(0, 1, 1, 1, 1)), cfg, Seed(0))
    assert spy.rows == [2] * 16
    assert rollouts.num_forwards == 32
    assert rollouts.step_map[1].tolist() == [*[0] * 4, *[4] * 4, *[8] * 4, *[12] * 4]
    assert sorted(rollouts.step_map[0].tolist()) == list(range(16))


CASES: dict[str, dict] = {
    "plain": {},
    "support": {"top_k": 6, "record_support": True, "cfg_scale": 0.5},
    "threshold": {"threshold": 0.5, "diffusion_steps": 16},
    "origin": {"remasking": "origin"},
    "remdm_conf": {"remasking": "remdm_conf"},
    "rcr": {"remasking": "rcr"},
}


@pytest.mark.parametrize("name", CASES)
def test_nobodys_records_change(decoder: MaskedDecoder, name: str) -> None:
    """Every record to the last bit, with rows that stop early and rows that begin with a later block."""
    canvas = hinted(canvases(generations=4), 0.8)
    cfg = replace(CFG, block_length=2, temperature=0.3, **CASES[name])
    stop = int(
        denoise(decoder, replace(canvas, eos_id=None), cfg, Seed(5))
        .completion.mode()
        .values.mode()
        .values
    )
    canvas = replace(canvas, eos_id=stop)
    whole = denoise(decoder, canvas, cfg, Seed(5))
    assert len(set(whole.num_steps.tolist())) > 2
    for size in (2, 5):
        some = denoise(decoder, canvas, replace(cfg, rollout_batch_size=size), Seed(5))
        assert_same_bits(some, whole)
    watched = denoise(decoder, canvas, cfg, Seed(5), on_step=lambda step, tokens: None)
    assert torch.equal(watched.step_map, whole.step_map)
    assert torch.equal(watched.tokens, whole.tokens)


def block_canvases() -> Canvas:
    prompts = [
        Prompt("", tuple((torch.arange(n) * 13 % 90 + 10).tolist()), row_id=n)
        for n in (6, 3, 12, 5, 8, 1, 9)
    ]
    canvas = masked_canvases(
        prompts, num_generations=1, completion_length=16, mask_id=SDAR_MASK, pad_id=SDAR_PAD
    )
    hint = torch.zeros(7, 16, dtype=torch.bool)
    hint[2, 3:13], hint[4, :9] = True, True  # blocks given in the middle and at the beginning
    return with_hints(canvas, torch.full((7, 16), 77), hint)


@pytest.mark.parametrize(
    "change",
    [{}, {"threshold": 0.02, "diffusion_steps": 16}, {"remasking": "remdm_conf"}],
    ids=["plain", "threshold", "remdm_conf"],
)
def test_slots_of_kept_keys_and_values_are_used_again(change: dict) -> None:
    policy = public_model("sdar").double()
    cfg = replace(CFG, **change)
    canvas = block_canvases()
    open_ended = denoise(policy, canvas, replace(cfg, use_cache=False), Seed(2))
    stop = int(open_ended.completion[~canvas.frozen].mode().values)
    canvas = replace(canvas, eos_id=stop)
    plain = denoise(policy, canvas, replace(cfg, use_cache=False), Seed(2))
    assert len(set(plain.num_steps.tolist())) > 1
    made: list[int] = []
    new_cache = policy.new_cache
    policy.new_cache = lambda batch, capacity: made.append(batch) or new_cache(batch, capacity)  # type: ignore[method-assign]
    for size in (7, 2):
        made.clear()
        kept = denoise(policy, canvas, replace(cfg, rollout_batch_size=size), Seed(2))
        assert torch.equal(kept.tokens, plain.tokens)
        assert torch.equal(kept.step_map, plain.step_map)
        assert torch.equal(kept.num_steps, plain.num_steps)
        torch.testing.assert_close(kept.commit_logprob, plain.commit_logprob)
        # the slots once, then the prompts of those that enter
        assert made[0] == size
        assert sum(made) <= size + 7


def test_parts_are_rows_that_stand_alike() -> None:
    places = ((0, 1, 3), (1, 0, 3), (2, 0, 0), (3, 0, 3))
    rows = [InFlight(*place, [2, 1, 0] if place[2] else [0, 0, 0]) for place in places]
    rows.append(InFlight(4, 0, 5, [3, 2, 0], ready=False))
    rows.sort(key=InFlight.standing)
    assert [r.row for r in rows] == [1, 3, 0, 4, 2]
    parts = working(rows, 3, counted=True)
    assert [(p.first, p.last, p.left, p.quota, p.tick) for p in parts] == [
        (0, 2, 3, 2, 0),
        (2, 3, 3, 2, 3),
    ]
    for r in rows:
        r.advance(counted=True)
    parts = working(rows, 3, counted=True)
    assert [(p.first, p.last, p.left, p.quota, p.tick) for p in parts] == [
        (0, 2, 1, 1, 1),
        (2, 3, 1, 1, 4),
    ]
    assert rows[3].step == 0  # it waits
