"""Steps of fixed shape, as a CUDA graph wants them: the same tokens from memory that never moves."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from gpu_checks import needs_gpu
from public_configs import public_model
from test_rollout_flight import assert_same_bits, block_canvases
from torch import Tensor
from toys import MASK, PAD, VOCAB, canvases, hinted

from igpo.canvas import masked_canvases
from igpo.config import RolloutConfig
from igpo.models import MaskedDecoder, MaskedDecoderConfig
from igpo.rollout import denoise, graphs, sampler
from igpo.types import Prompt, Seed

CFG = RolloutConfig(max_completion_length=16, block_length=4, diffusion_steps=8, temperature=0.8)


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Everything a graph needs but the graph."""
    monkeypatch.setattr(
        sampler, "fixed_shapes", lambda *_: partial(graphs.FixedShape, capture=False)
    )
    return monkeypatch


def decoder(**options: Any) -> MaskedDecoder:
    config = MaskedDecoderConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, mask_token_id=MASK, pad_token_id=PAD, **options,
    )  # fmt: skip
    return MaskedDecoder.from_seed(config, 1)


class Spy:
    """A policy that writes down where its inputs lie and what shape they have."""

    head_bias = None

    def __init__(self, policy: MaskedDecoder) -> None:
        self.policy, self.head_weight = policy, policy.head_weight
        self.addresses: set[tuple[int, ...]] = set()
        self.shapes: list[torch.Size] = []

    def hidden(self, tokens: Tensor, attention_mask: Any, position_ids: Any) -> Tensor:
        self.addresses.add(tuple(x.data_ptr() for x in (tokens, attention_mask, position_ids)))
        self.shapes.append(tokens.shape)
        return self.policy.hidden(tokens, attention_mask, position_ids)


@pytest.mark.parametrize(
    "change",
    [{}, {"cfg_scale": 0.7}, {"threshold": 0.5, "diffusion_steps": 16}],
    ids=["plain", "guidance", "threshold"],
)
def test_the_same_rollout_from_memory_that_never_moves(
    fixed: pytest.MonkeyPatch, change: dict
) -> None:
    canvas, cfg = hinted(canvases()), replace(CFG, rollout_batch_size=8, **change)
    spy = Spy(decoder())
    rollouts = denoise(spy, canvas, cfg, Seed(3))
    assert len(spy.addresses) == 1
    assert len(set(spy.shapes)) <= graphs.SIZES
    fixed.undo()
    assert_same_bits(rollouts, denoise(spy.policy, canvas, cfg, Seed(3)))
    assert len(spy.addresses) == 1


def test_a_full_batch_has_one_shape(fixed: pytest.MonkeyPatch) -> None:
    spy, cfg = Spy(decoder()), replace(CFG, rollout_batch_size=3)
    denoise(spy, canvases(), cfg, Seed(3))
    assert len(spy.shapes) >= 3 * 8
    assert len(set(spy.shapes)) == len(spy.addresses) == 1


@pytest.mark.parametrize("size", [2, 7])
def test_kept_keys_and_values_have_one_shape_too(fixed: pytest.MonkeyPatch, size: int) -> None:
    policy = public_model("sdar").double()
    canvas, cfg = block_canvases(), replace(CFG, rollout_batch_size=size)
    lengths: set[tuple[int, int]] = set()
    hidden = policy.hidden

    def spy(tokens: Tensor, *rest: Any, cache: Any = None, store: bool = False) -> Tensor:
        if not store:
            lengths.add((len(tokens), cache.length))
        return hidden(tokens, *rest, cache=cache, store=store)

    policy.hidden = spy  # type: ignore[method-assign]
    rollouts = denoise(policy, canvas, cfg, Seed(2))
    # halves of the slots at the end, and always as many keys
    assert [n for n, _ in sorted(lengths, reverse=True)] == {2: [2, 1], 7: [7, 3, 1]}[size][
        : len(lengths)
    ]
    assert len({length for _, length in lengths}) == 1
    fixed.undo()
    policy.hidden = hidden  # type: ignore[method-assign]
    plain = denoise(policy, canvas, replace(cfg, use_cache=False), Seed(2))
    assert torch.equal(rollouts.tokens, plain.tokens)
    assert torch.equal(rollouts.step_map, plain.step_map)
    torch.testing.assert_close(rollouts.commit_logprob, plain.commit_logprob)


def test_the_log_says_what_was_chosen(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs._say.cache_clear()
    cuda = torch.device("cuda")
    experts = decoder(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    flex = decoder()
    flex.set_attn_implementation("flex_attention")
    with caplog.at_level(logging.INFO):
        assert graphs.fixed_shapes(decoder(), torch.device("cpu"), "auto") is None
        assert graphs.fixed_shapes(experts, cuda, "off") is None
        assert not caplog.records
        for policy in (experts, experts, flex, decoder()):
            assert graphs.fixed_shapes(policy, cuda, "auto") is None
        monkeypatch.setattr(graphs, "CHECKED", "H200")
        assert graphs.fixed_shapes(decoder(), cuda, "auto") is not None
    said = [record.message for record in caplog.records]
    assert ["experts" in said[0], "flex_attention" in said[1]] == [True, True]
    assert ["not been checked" in said[2], "replay" in said[3]] == [True, True]
    assert len(said) == 4
    assert graphs.fixed_shapes(decoder(), cuda, "on") is not None


def test_what_cannot_be_done_is_refused_when_asked_for() -> None:
    for option, message in (
        (
            "on",
            "must be auto or off here, got 'on': graphs are of CUDA devices, and the canvas is on cpu",
        ),
        ("yes", "cuda_graphs must be one of auto, on, off, got 'yes'"),
    ):
        with pytest.raises(ValueError, match=message):
            denoise(decoder(), canvases(), replace(CFG, cuda_graphs=option), Seed(0))


@pytest.mark.gpu
@pytest.mark.parametrize("change", [{}, {"cfg_scale": 0.7}], ids=["plain", "guidance"])
def test_a_graph_changes_nothing(change: dict) -> None:
    needs_gpu(gib=1)
    canvas = masked_canvases(
        [Prompt("", tuple(range(1, n)), row_id=n) for n in (4, 7, 9)], num_generations=3, completion_length=16,
        mask_id=MASK, pad_id=PAD, device="cuda",
    )  # fmt: skip
    policy, cfg = decoder(), replace(CFG, rollout_batch_size=4, **change)
    torch.nn.Module.to(policy, "cuda")
    graph, plain = (
        denoise(policy, canvas, replace(cfg, cuda_graphs=option), Seed(3))
        for option in ("on", "off")
    )
    assert torch.equal(graph.tokens, plain.tokens)
    assert torch.equal(graph.step_map, plain.step_map)
