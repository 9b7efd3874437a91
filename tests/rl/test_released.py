"""Parity with the authors' released code, on data it produced, and the properties of its hint layout."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from igpo.config import AlgorithmConfig, InpaintConfig, RolloutConfig
from igpo.rl.algorithms import build_algorithm
from igpo.rl.likelihood import InnerUpdate
from igpo.rl.released_layout import FREE_TAIL, MAX_SPACING, cut, place, reveal, scaled_layout
from igpo.types import Canvas, Draw, Graded, Prompt, Rollouts, Seed

MASK, PROMPT, LENGTH = 126, 9, 64
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


class FixturePolicy:
    """The toy model of the fixture."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        self.E, self.P, self.W1 = data["model.E"], data["model.P"], data["model.W1"]
        self.W2 = data["model.W2"].clone().requires_grad_()

    def hidden(self, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        h = self.E[tokens] + self.P[position_ids]
        clear = (tokens != MASK).unsqueeze(-1).to(h.dtype)
        context = (h * clear).sum(1, keepdim=True) / clear.sum(1, keepdim=True).clamp(min=1)
        near = h.roll(1, 1) + h.roll(-1, 1)
        return torch.tanh((h + context + 0.5 * near) @ self.W1)

    @property
    def head_weight(self) -> Tensor:
        return self.W2.T

    head_bias = None


@pytest.fixture
def data(shared) -> dict[str, Tensor]:
    return load_file(shared / "fixtures" / "igpo_released" / "case0.safetensors")


def graded(data: dict[str, Tensor]) -> Graded:
    tokens, frozen = data["hinted.tokens"], data["hinted.frozen"][:, PROMPT:]
    rows = torch.arange(len(tokens))
    canvas = Canvas(
        data["hinted.canvas"], torch.ones_like(tokens, dtype=torch.bool),
        torch.arange(PROMPT + LENGTH).expand_as(tokens), frozen, rows, torch.zeros_like(rows), PROMPT, MASK,
    )  # fmt: skip
    empty = torch.zeros(frozen.shape)
    rollouts = Rollouts(canvas, tokens, frozen.long(), empty, empty, rows + 32, 128)
    right = data["advantages"] > 0
    return Graded(rollouts, right.float(), right, right, ("",) * len(rows))


def released(ratio: str, **options) -> SimpleNamespace:
    cfg = AlgorithmConfig(
        algorithm="igpo_released", importance_sampling_level=ratio, num_iterations=4,
        inpaint=InpaintConfig(entropy_filter=0.2), **options,
    )  # fmt: skip
    rollout = RolloutConfig(max_completion_length=LENGTH, block_length=16, diffusion_steps=32)
    return build_algorithm(cfg, rollout, lambda rollouts, prompts: None, pad_id=0)


@pytest.mark.parametrize("masking", ["full", "partial"])
@pytest.mark.parametrize("ratio", ["gspo", "token"])
def test_likelihood_loss_and_gradient_of_the_released_code(data, ratio: str, masking: str) -> None:
    expected = {
        key.removeprefix(f"loss.{ratio}.{masking}."): value
        for key, value in data.items()
        if key.startswith(f"loss.{ratio}.{masking}.")
    }
    policy, batch_of = FixturePolicy(data), graded(data)
    algorithm = released(
        "sequence" if ratio == "gspo" else "token",
        likelihood="mean_field" if masking == "full" else "random_mask",
    )
    likelihood = algorithm.likelihood
    if (
        masking == "partial"
    ):  # the masked positions are the fixture's; what is read and counted is ours
        ours = likelihood.draw(batch_of.rollouts, Seed(0))[0]
        masked = expected["masked"].bool()
        update = InnerUpdate((Draw(expected["noisy"] == MASK, ours.draws[0].score),), masked)
        object.__setattr__(likelihood, "draw", lambda rollouts, seed: [update] * 4)
    object.__setattr__(likelihood, "needs_reference", False)
    batch = likelihood.prepare(policy, batch_of, Seed(0))
    canvas = batch.draws[0][0].canvas(batch_of.rollouts.tokens, MASK)
    assert torch.equal(canvas, expected["noisy"])
    logprob = likelihood(policy, batch, 0)
    torch.testing.assert_close(logprob, expected["logprob"], **TOLERANCE)
    assert torch.equal(batch.token_mask[0], expected["kept"].bool())

    # the fixture's old policy and reference are other weights: their log-probs are given
    batch = SimpleNamespace(
        canvas=batch.canvas, token_mask=batch.token_mask, old_logprob=(expected["old_logprob"],),
        ref_logprob=(expected["ref_logprob"],),
    )  # fmt: skip
    objective = algorithm.objective
    divisor = objective.divisor(batch, torch.arange(len(data["advantages"])), 0)
    loss, metrics = objective(logprob, batch, data["advantages"], 0, divisor)
    torch.testing.assert_close(loss, expected["value"], **TOLERANCE)
    assert metrics["kl"] == pytest.approx(float(expected["metric.kl"]), rel=1e-4)
    assert metrics["logp/ratio_mean"] == pytest.approx(
        float(expected["metric.policy_ratio"]), rel=1e-5
    )
    (gradient,) = torch.autograd.grad(loss, policy.W2)
    torch.testing.assert_close(gradient, expected["grad_W2"], rtol=1e-4, atol=1e-6)


def test_random_masking_of_the_released_code_reads_every_position(data) -> None:
    algorithm = released("sequence", likelihood="random_mask")
    draws = algorithm.likelihood.draw(graded(data).rollouts, Seed(1))
    counts = [int(update.counted.sum()) for update in draws]
    assert counts[-1] == 4 * LENGTH > max(counts[:-1])
    for update in draws:
        assert update.draws[0].score.all()
        assert torch.equal(update.counted, update.draws[0].masked[:, PROMPT:])


def test_hinted_canvas_of_the_released_code(data) -> None:
    trace = data["hinted.trace"].tolist()
    frozen = data["hinted.frozen"][:, PROMPT:]
    for row, mask in enumerate(frozen):
        # the trace is longer than the canvas less its free tail: nothing is stretched, runs are chunks
        edges = torch.cat([mask.new_zeros(1), mask, mask.new_zeros(1)]).int().diff().nonzero()[:, 0]
        runs = [(int(a), int(b)) for a, b in edges.view(-1, 2)]
        hints, hint_mask = place(trace, runs, LENGTH)
        assert torch.equal(hint_mask, mask)
        canvas = torch.where(hint_mask, hints, MASK)
        assert torch.equal(canvas, data["hinted.canvas"][row, PROMPT:])


CFG = InpaintConfig(layout="scaled", exclude_answer=False)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.floats(0.01, 1.0), st.integers(0, 2**20), st.booleans())
def test_scaled_layout_properties(length: int, ratio: float, seed: int, last: bool) -> None:
    canvas_length = 128
    rng = np.random.default_rng(seed)
    usable = min(length, canvas_length - FREE_TAIL)
    chunks = cut(usable, CFG, rng)
    assert [start for start, _ in chunks] == [0, *[end for _, end in chunks]][: len(chunks)]
    assert all(CFG.chunk_min <= end - start <= CFG.chunk_max for start, end in chunks)
    assert usable - (chunks[-1][1] if chunks else 0) < CFG.chunk_min
    shown = reveal(chunks, ratio, rng, last=last)
    wanted = len(chunks) - int(len(chunks) * (1 - ratio))
    assert len(shown) - wanted in ((0, 1) if last else (0,))
    assert not last or not chunks or shown[-1] == chunks[-1]
    trace = [7 + i for i in range(length)]
    hints, hint_mask = place(trace, shown, canvas_length)
    assert not hint_mask[-FREE_TAIL:].any()
    assert set(hints[hint_mask].tolist()) <= {trace[k] for a, b in shown for k in range(a, b)}
    columns = hint_mask.nonzero()[:, 0]
    assert columns.numel() < 2 or int(columns.diff().max()) <= MAX_SPACING + 1


def test_gaps_are_stretched_and_overflow_is_cut() -> None:
    hints, hint_mask = place(range(40), [(10, 15), (20, 30)], 90)  # stretch 60 / 40
    assert hint_mask.nonzero()[:, 0].tolist() == [*range(15, 20), *range(27, 37)]
    assert hints[hint_mask].tolist() == [*range(10, 15), *range(20, 30)]
    _, hint_mask = place(
        range(50), [(0, 5), (20, 28), (40, 45)], 60
    )  # no stretch, 30 usable columns
    assert hint_mask.nonzero()[:, 0].tolist() == [*range(5), *range(20, 28)]
    _, hint_mask = place(range(20), [(15, 20)], 50)  # 20 usable: starts at 15
    assert hint_mask.nonzero()[:, 0].tolist() == [*range(15, 20)]
    _, hint_mask = place(range(100), [(0, 5), (95, 100)], 400)  # 1.5 * 90 = 135 > MAX_SPACING
    assert hint_mask.nonzero()[:, 0].tolist() == [*range(5), *range(105, 110)]


def layout(toy, ratios: list[float], cfg: InpaintConfig) -> tuple[Tensor, Tensor]:
    prompt = Prompt("", (1,), 0, trace_ids=tuple(range(60)), hint_length=40)
    canvas = toy.canvas([prompt], len(ratios))
    canvas = Canvas(
        canvas.tokens, canvas.attention_mask, canvas.position_ids,
        torch.zeros(len(ratios), 100, dtype=torch.bool), canvas.row_ids, canvas.group_ids,
        canvas.prompt_length, canvas.mask_id,
    )  # fmt: skip
    return scaled_layout([prompt], canvas, torch.tensor(ratios), cfg, Seed(4))


def test_scaled_layout_sorts_ratios_and_may_reveal_the_answer(toy) -> None:
    hints, hint_mask = layout(toy, [1.0, 0.3, 0.6], CFG)
    counts = hint_mask.sum(1).tolist()
    assert counts == sorted(counts)
    assert (hints * hint_mask).amax(
        1
    ).min() >= 40  # the last chunk, which holds the answer, in every row
    excluded = InpaintConfig(layout="scaled", exclude_answer=True)
    hints, hint_mask = layout(toy, [1.0, 0.3, 0.6], excluded)
    assert (hints * hint_mask).max() < 40
    assert not layout(toy, [0.0, 0.0], CFG)[1].any()
