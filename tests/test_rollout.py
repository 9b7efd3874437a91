from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toys import (
    MASK,
    PAD,
    VOCAB,
    Scripted,
    before_step,
    canvases,
    early_script,
    hinted,
    small_decoder,
)

from igpo.canvas import masked_canvases
from igpo.config import RolloutConfig
from igpo.models import MaskedDecoder
from igpo.rollout import denoise, transfer_schedule
from igpo.types import GIVEN, Canvas, Prompt, Rollouts, Seed, take

CFG = RolloutConfig(max_completion_length=16, block_length=8, diffusion_steps=8, temperature=1.0)


@pytest.fixture(scope="module")
def decoder() -> MaskedDecoder:
    return small_decoder()


def assert_same(a: Rollouts, b: Rollouts) -> None:
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.step_map, b.step_map)
    assert torch.equal(a.num_steps, b.num_steps)
    torch.testing.assert_close(a.commit_logprob, b.commit_logprob, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.commit_entropy, b.commit_entropy, rtol=1e-4, atol=1e-5)


def one_row_at_a_time(
    policy: MaskedDecoder, canvas: Canvas, row: int, cfg: RolloutConfig
) -> tuple[Tensor, Tensor]:
    """The sampler from its description, greedy, for one sequence: (completion, step of each position)."""
    one = take(canvas, torch.tensor([row]))
    tokens, steps = one.completion[0].clone(), torch.full((16,), GIVEN)
    blocks = 16 // cfg.block_length
    per_block = cfg.diffusion_steps // blocks
    for block in range(blocks):
        inside = range(block * cfg.block_length, (block + 1) * cfg.block_length)
        todo = sum(tokens[i] == MASK for i in inside)
        for step in range(per_block):
            quota = todo // per_block + (1 if step < todo % per_block else 0)
            now = torch.cat((one.tokens[0, : one.prompt_length], tokens))[None]
            logits = policy(now, one.attention_mask, one.position_ids).logits[
                0, one.prompt_length :
            ]
            p = logits.masked_fill(torch.arange(VOCAB) == MASK, -torch.inf).softmax(-1)
            best = sorted(
                (i for i in inside if tokens[i] == MASK), key=lambda i: -p[i].max().item()
            )[:quota]
            for i in best:
                tokens[i], steps[i] = p[i].argmax(), block * per_block + step
    return tokens, steps


@pytest.mark.parametrize(
    "cfg", [CFG, replace(CFG, diffusion_steps=16, block_length=4)], ids=["two-a-step", "one"]
)
def test_matches_the_description(decoder: MaskedDecoder, cfg: RolloutConfig) -> None:
    canvas, cfg = hinted(canvases()), replace(cfg, temperature=0.0, early_stop=False)
    rollouts = denoise(decoder, canvas, cfg, Seed(0))
    for row in range(9):
        with torch.no_grad():
            tokens, steps = one_row_at_a_time(decoder, canvas, row, cfg)
        assert torch.equal(rollouts.completion[row], tokens)
        assert torch.equal(rollouts.step_map[row], steps)


def released_toy(weights: dict[str, Tensor]):
    """The toy model of the parity fixture: hidden is the tanh layer, the head is W2."""
    e, p, w1, w2 = (weights[f"model.{name}"] for name in ("E", "P", "W1", "W2"))

    class Toy:
        head_weight, head_bias = w2.T.contiguous(), None

        def hidden(self, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
            h = e[tokens] + p[position_ids]
            known = (tokens != 126)[..., None]
            c = (h * known).sum(1, keepdim=True) / known.sum(1, keepdim=True)
            n = h.roll(1, 1) + h.roll(-1, 1)
            return torch.tanh((h + c + n / 2) @ w1)

    return Toy()


@pytest.mark.parametrize("case", ["plain", "hinted"])
def test_matches_the_released_sampler(shared: Path, case: str) -> None:
    data = load_file(shared / "fixtures/igpo_released/case0.safetensors")
    tokens, frozen = data[f"{case}.canvas"], data[f"{case}.frozen"][:, 9:]
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    canvas = Canvas(
        tokens, everywhere, everywhere.cumsum(-1) - 1, frozen, torch.arange(4), torch.arange(4), 9, 126,
    )  # fmt: skip
    cfg = RolloutConfig(
        max_completion_length=64, block_length=16, diffusion_steps=32, temperature=0.0
    )
    rollouts = denoise(released_toy(data), canvas, cfg, Seed(0))
    assert torch.equal(rollouts.tokens, data[f"{case}.tokens"])
    assert frozen.any() == (case == "hinted")


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_trajectory_rebuilds_every_canvas(decoder: MaskedDecoder, temperature: float) -> None:
    seen: dict[int, Tensor] = {}
    cfg = replace(CFG, temperature=temperature)
    canvas = hinted(canvases())
    rollouts = denoise(decoder, canvas, cfg, Seed(3), on_step=seen.__setitem__)
    assert list(seen) == list(range(8))
    assert torch.equal(before_step(rollouts, 0), canvas.tokens)
    for step, tokens in seen.items():
        assert torch.equal(before_step(rollouts, step + 1), tokens)
    assert torch.equal(rollouts.tokens, seen[7])
    for earlier, later in pairwise(seen.values()):  # committed tokens never change
        assert torch.equal(earlier[earlier != MASK], later[earlier != MASK])


def test_hints_stay_and_the_rest_is_committed(decoder: MaskedDecoder) -> None:
    canvas = hinted(canvases(), ratio=1.0)
    rollouts = denoise(decoder, canvas, replace(CFG, early_stop=False), Seed(0))
    frozen = canvas.frozen
    assert torch.equal(rollouts.completion[frozen], canvas.completion[frozen])
    assert (rollouts.step_map[frozen] == GIVEN).all()
    assert (rollouts.completion != MASK).all()
    for step in range(8):
        masked = (~frozen).unflatten(1, (2, 8)).sum(-1)[:, step // 4]
        share = masked // 4 + (step % 4 < masked % 4)
        assert torch.equal((rollouts.step_map == step).sum(1), share)
    committed = rollouts.step_map >= 0
    assert torch.equal(committed.sum(1), 16 - frozen.sum(1))
    assert (rollouts.commit_logprob[committed] < 0).all()
    assert (rollouts.commit_entropy[committed] > 0).all()
    assert not rollouts.commit_logprob[~committed].any()
    assert not rollouts.commit_entropy[~committed].any()


def test_commit_statistics_are_those_of_the_moment(decoder: MaskedDecoder) -> None:
    cfg = replace(CFG, temperature=1.7, suppress_tokens=(PAD,))
    rollouts = denoise(decoder, hinted(canvases()), cfg, Seed(1))
    canvas = rollouts.canvas
    for step in range(8):
        tokens = before_step(rollouts, step)
        with torch.no_grad():
            logits = decoder(tokens, canvas.attention_mask, canvas.position_ids).logits
        logits = logits[:, canvas.prompt_length :].double() / 1.7
        logits[..., [PAD, MASK]] = -torch.inf
        now = rollouts.step_map == step
        q = logits.log_softmax(-1)[now]
        logprob = q.gather(1, rollouts.completion[now][:, None])[:, 0]
        torch.testing.assert_close(
            rollouts.commit_logprob[now].double(), logprob, rtol=1e-4, atol=1e-5
        )
        entropy = torch.special.entr(q.exp()).sum(-1)
        torch.testing.assert_close(
            rollouts.commit_entropy[now].double(), entropy, rtol=1e-4, atol=1e-5
        )
    assert not torch.isin(rollouts.completion[~canvas.frozen], torch.tensor([PAD, MASK])).any()


def test_rows_do_not_depend_on_their_company(decoder: MaskedDecoder) -> None:
    canvas = hinted(canvases())
    whole = denoise(decoder, canvas, CFG, Seed(7))
    for size in (1, 2, 4, 9):
        small = denoise(decoder, canvas, replace(CFG, rollout_batch_size=size), Seed(7))
        assert_same(small, whole)
        assert small.num_forwards == whole.num_forwards
    order = torch.tensor([8, 1, 1, 6, 0, 3])
    assert_same(denoise(decoder, take(canvas, order), CFG, Seed(7)), take(whole, order))


def test_rows_do_not_depend_on_the_padding_of_their_prompt(decoder: MaskedDecoder) -> None:
    whole = denoise(decoder, canvases(), CFG, Seed(7))
    alone = canvases(ends=(3, 5, 2))
    for p in range(3):
        start = int((~alone.attention_mask[3 * p]).sum())
        rows = take(alone, torch.arange(3 * p, 3 * p + 3))
        bare = replace(
            rows, tokens=rows.tokens[:, start:], attention_mask=rows.attention_mask[:, start:],
            position_ids=rows.position_ids[:, start:], prompt_length=rows.prompt_length - start,
        )  # fmt: skip
        mine = denoise(decoder, bare, CFG, Seed(7))
        theirs = take(whole, torch.arange(3 * p, 3 * p + 3))
        assert torch.equal(mine.completion, theirs.completion)
        assert torch.equal(mine.step_map, theirs.step_map)


def test_tokens_depend_on_seed_step_and_row_id(decoder: MaskedDecoder) -> None:
    canvas = canvases()
    first = denoise(decoder, canvas, CFG, Seed(7)).tokens
    assert torch.equal(first, denoise(decoder, canvas, CFG, Seed(7)).tokens)
    others = [
        denoise(decoder, canvas, CFG, Seed(8)),
        denoise(decoder, canvas, CFG, Seed(7).at(1)),
        denoise(decoder, canvas, CFG, Seed(7).named("inpaint")),
        denoise(decoder, replace(canvas, row_ids=canvas.row_ids + 1), CFG, Seed(7)),
    ]
    for other in others:
        assert not torch.equal(other.tokens, first)
    greedy = replace(CFG, temperature=0.0)
    assert torch.equal(
        denoise(decoder, canvas, greedy, Seed(7)).tokens, denoise(decoder, canvas, greedy, Seed(8)).tokens
    )  # fmt: skip


def chi_square(counts: Tensor, p: Tensor) -> float:
    expected = counts.sum() * p
    return float(((counts - expected) ** 2 / expected).sum())


def test_draws_follow_the_tempered_softmax_independently() -> None:
    """Two positions in two blocks, 6000 rows: each marginal is softmax(logits/T), and the pair is independent."""
    logits = torch.randn(1, 2, 5)
    canvas = masked_canvases(
        [Prompt("", (0,), row_id=4)], num_generations=6000, completion_length=2, mask_id=7, pad_id=6
    )
    cfg = RolloutConfig(
        2, block_length=1, diffusion_steps=2, temperature=0.6, rollout_batch_size=6000
    )
    drawn = denoise(Scripted(logits), canvas, cfg, Seed(11)).completion
    p = (logits[0].double() / 0.6).softmax(-1)
    joint = (p[0][:, None] * p[1][None]).flatten()
    counts = torch.bincount(drawn[:, 0] * 5 + drawn[:, 1], minlength=25).double()
    assert chi_square(counts, joint) < 52  # 24 degrees of freedom: p about 1e-3


def test_random_remasking_ignores_the_logits() -> None:
    logits = (
        torch.randn(1, 6, 5) * torch.arange(1, 7)[:, None]
    )  # later positions are more confident
    canvas = masked_canvases(
        [Prompt("", (0,), row_id=4)], num_generations=3000, completion_length=6, mask_id=7, pad_id=6
    )
    cfg = RolloutConfig(
        6, block_length=6, diffusion_steps=6, remasking="random", rollout_batch_size=3000
    )
    steps = denoise(Scripted(logits), canvas, cfg, Seed(2)).step_map
    assert torch.equal(steps.sort(1).values, torch.arange(6).expand(3000, 6))
    for position in range(6):
        counts = torch.bincount(steps[:, position], minlength=6).double()
        assert (
            chi_square(counts, torch.full((6,), 1 / 6)) < 24
        )  # 5 degrees of freedom: p about 2e-4


def test_no_rows() -> None:
    rollouts = denoise(early_script(), take(canvases(), torch.arange(0)), CFG, Seed(0))
    assert rollouts.tokens.shape == (0, canvases().tokens.shape[1])
    assert rollouts.num_steps.shape == (0,)
    assert rollouts.num_forwards == 0


def test_transfer_schedule_is_an_even_split() -> None:
    assert transfer_schedule(7, 3) == [3, 2, 2]
    assert transfer_schedule(2, 4) == [1, 1, 0, 0]
    for masked in range(12):
        for steps in range(1, 9):
            schedule = transfer_schedule(masked, steps)
            assert sum(schedule) == masked
            assert schedule == sorted(schedule, reverse=True)
            assert schedule[0] - schedule[-1] <= 1


def test_nan_logits_are_an_error() -> None:
    policy = early_script()
    policy.script[2, 6] = torch.nan
    cfg = RolloutConfig(16, block_length=4, diffusion_steps=8, temperature=0.0, early_stop=False)
    canvas = canvases(generations=1, ends=(0, 1, 2, 3))
    with pytest.raises(
        FloatingPointError, match=r"got none \(NaN, or all -inf\) in block 1 of rows \[2\]"
    ):
        denoise(policy, canvas, cfg, Seed(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"block_length": 5},
            r"block_length must divide the 16 completion tokens, got 5\. Choose one of \[1, 2, 4, 8, 16\]",
        ),
        ({"block_length": 0}, "block_length must divide the 16 completion tokens, got 0"),
        (
            {"diffusion_steps": 5},
            r"multiple of the 2 blocks and at most 16, got 5\. Choose one of \[2, 4, 6, .*16\]",
        ),
        ({"diffusion_steps": 32}, "at most 16, got 32"),
        ({"diffusion_steps": 0}, "at most 16, got 0"),
        (
            {"remasking": "confidence"},
            r"remasking must be one of \['entropy', 'low_confidence', .*\], got 'confidence'",
        ),
        ({"rollout_batch_size": 0}, "rollout_batch_size must be positive, got 0"),
        ({"temperature": -1.0}, "temperature must be finite and >= 0, got -1.0"),
        ({"suppress_tokens": (VOCAB,)}, r"suppress_tokens must be in \[0, 23\), got \(23,\)"),
    ],
)
def test_rejects_bad_configurations(decoder: MaskedDecoder, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        denoise(decoder, canvases(), replace(CFG, **change), Seed(0))


def test_rejects_a_canvas_with_tokens_that_are_not_frozen(decoder: MaskedDecoder) -> None:
    canvas = canvases()
    canvas.completion[2, 3] = 1
    with pytest.raises(
        ValueError, match=r"canvas\.frozen must be True exactly where .* got 1 positions"
    ):
        denoise(decoder, canvas, CFG, Seed(0))
