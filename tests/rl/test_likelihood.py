from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch

from igpo.rl.likelihood import Likelihood, mask_schedule, mean_field, random_mask, step_map
from igpo.rollout import denoise
from igpo.types import GIVEN, Seed, take

SEED = Seed(11).at(3)
HINTED = (1, 5, 6)  # rows with hints in the `hinted` batch


def likelihood(draw, *, num_iterations: int = 3, **options) -> Likelihood:
    fields = {
        "needs_reference": False, "entropy_filter": 1.0, "mask_after_eos": False, "batch_size": 5,
    }  # fmt: skip
    return Likelihood(
        partial(draw, num_iterations=num_iterations), num_iterations, **(fields | options)
    )


DRAWS = {
    "mean_field": mean_field,
    "prompt_masks": partial(mean_field, p_mask_prompt=0.5),
    "random_mask": partial(random_mask, num_levels=100, first_level=(20, 40)),
    "step_map": partial(step_map, num_slices=3),
}


@pytest.fixture
def batch(toy):
    """12 rows of 3 prompts, no hints."""
    rollouts = toy.rolled(toy.canvas(toy.prompts()))
    return toy.graded(rollouts, torch.arange(12) % 3 == 0)


@pytest.fixture
def hinted(toy):
    """The same with hints on three rows, at positions 2, 3, 7, 8, 9."""
    canvas = toy.canvas(toy.prompts())
    mask = torch.zeros_like(canvas.frozen)
    for row in HINTED:
        mask[row, [2, 3, 7, 8, 9]] = True
    tokens = canvas.tokens.clone()
    tokens[:, canvas.prompt_length :][mask] = 4
    rollouts = toy.rolled(replace(canvas, tokens=tokens, frozen=mask))
    return toy.graded(rollouts, torch.arange(12) % 3 == 0)


def test_mean_field_is_the_log_softmax_on_the_full_mask(toy, batch) -> None:
    policy, model = toy.Policy(), likelihood(mean_field)
    prepared = model.prepare(policy, batch, SEED)
    rollouts = batch.rollouts
    expected = (
        toy.logprobs(policy, rollouts.canvas, rollouts.canvas.tokens)
        .gather(-1, rollouts.completion[..., None])
        .squeeze(-1)
    )
    torch.testing.assert_close(model(policy, prepared, 1), expected)
    assert prepared.token_mask[1].all()


def test_equal_draws_are_forwarded_once(toy, batch) -> None:
    policy = toy.Policy()
    likelihood(mean_field, batch_size=12).prepare(policy, batch, SEED)
    assert len(policy.forwards) == 1
    likelihood(DRAWS["prompt_masks"], batch_size=12).prepare(policy, batch, SEED)
    assert len(policy.forwards) == 1 + 3
    likelihood(mean_field, batch_size=5).prepare(policy, batch, SEED)
    assert [len(tokens) for tokens in policy.forwards[4:]] == [5, 5, 2]


@pytest.mark.parametrize("name", DRAWS)
def test_on_policy_ratio_is_exactly_one(toy, hinted, name: str) -> None:
    policy, model = toy.Policy(), likelihood(DRAWS[name], batch_size=12)
    prepared = model.prepare(policy, hinted, SEED)
    for inner in range(3):
        logprob = model(policy, prepared, inner)
        assert logprob.requires_grad
        assert torch.equal(logprob, prepared.old_logprob[inner])
        assert logprob[prepared.token_mask[inner]].ne(0).all()


@pytest.mark.parametrize("name", DRAWS)
def test_rows_do_not_depend_on_their_batch(toy, hinted, name: str) -> None:
    policy, model = toy.Policy(), likelihood(DRAWS[name])
    whole, order = model.prepare(policy, hinted, SEED), torch.randperm(12)
    shuffled = model.prepare(policy, take(hinted, order), SEED)
    for inner in range(3):
        expected = model(policy, whole, inner)
        torch.testing.assert_close(model(policy, shuffled, inner), expected[order])
        assert torch.equal(shuffled.token_mask[inner], whole.token_mask[inner][order])
        parts = [model(policy, take(whole, rows), inner) for rows in torch.arange(12).split(5)]
        torch.testing.assert_close(torch.cat(parts), expected)


@pytest.mark.parametrize("name", DRAWS)
def test_one_inner_update_needs_no_old_policy(toy, hinted, name: str) -> None:
    policy = toy.Policy()
    model = likelihood(DRAWS[name], num_iterations=1)
    prepared = model.prepare(policy, hinted, SEED)
    assert prepared.old_logprob == (None,)
    assert not policy.forwards
    assert model(policy, prepared, 0).shape == (12, toy.length)
    filtered = replace(model, entropy_filter=0.4).prepare(policy, hinted, SEED)
    assert sum(len(tokens) for tokens in policy.forwards[-1:]) <= len(HINTED)
    assert filtered.old_logprob == (None,)
    assert filtered.token_mask[0].sum() < prepared.token_mask[0].sum()


def test_the_reference_scores_the_same_draws(toy, batch) -> None:
    policy, other = toy.Policy(), toy.Policy(seed=1)
    model = likelihood(DRAWS["prompt_masks"], needs_reference=True)

    @contextmanager
    def reference():
        yield other

    prepared = model.prepare(policy, batch, SEED, reference)
    for inner in range(3):
        torch.testing.assert_close(prepared.ref_logprob[inner], model(other, prepared, inner))
    seen = torch.cat(other.forwards[: len(policy.forwards)])
    assert torch.equal(seen, torch.cat(policy.forwards[: len(policy.forwards)])[: len(seen)])
    with pytest.raises(ValueError, match=r"reference must be given for a KL term.*set beta=0"):
        model.prepare(policy, batch, SEED)


def test_prompt_masks_are_fresh_and_spare_padding(toy, batch) -> None:
    draws = DRAWS["prompt_masks"](batch.rollouts, SEED, num_iterations=3)
    canvas = batch.rollouts.canvas
    masked = [update.draws[0].masked[:, : canvas.prompt_length] for update in draws]
    assert not torch.equal(masked[0], masked[1])
    for mask in masked:
        assert not (mask & ~canvas.attention_mask[:, : canvas.prompt_length]).any()
        assert (
            0.2 < float(mask[canvas.attention_mask[:, : canvas.prompt_length]].float().mean()) < 0.8
        )
    again = DRAWS["prompt_masks"](batch.rollouts, SEED, num_iterations=3)
    assert torch.equal(draws[2].draws[0].masked, again[2].draws[0].masked)
    other = DRAWS["prompt_masks"](batch.rollouts, SEED.at(4), num_iterations=3)
    assert not torch.equal(draws[2].draws[0].masked, other[2].draws[0].masked)


def test_mask_schedule_golden() -> None:
    assert mask_schedule(300, 4, 1000) == (300, 533, 766, 1000)
    assert mask_schedule(300, 1, 1000) == (300,)
    assert mask_schedule(30, 2, 128) == (30, 128)


def test_random_masks_grow_to_the_full_mask(toy, batch) -> None:
    policy = toy.Policy()
    model = likelihood(DRAWS["random_mask"], num_iterations=4)
    prepared = model.prepare(policy, batch, SEED)
    counts = torch.stack([mask.sum(1) for mask in prepared.token_mask])
    assert (counts.diff(dim=0) >= 0).all()
    assert (counts[0] >= round(0.2 * toy.length)).all()
    assert (counts[0] <= round(0.4 * toy.length)).all()
    assert counts[0].unique().numel() > 1  # the first ratio is each row's own
    full = likelihood(mean_field)
    torch.testing.assert_close(
        model(policy, prepared, 3), full(policy, full.prepare(policy, batch, SEED), 0)
    )
    masked = prepared.draws[0][0].masked[:, batch.rollouts.canvas.prompt_length :]
    assert torch.equal(masked, prepared.token_mask[0])


@pytest.fixture
def denoised(toy):
    """Real rollouts at temperature 1, and their policy."""
    policy = toy.Policy()
    rollouts = denoise(policy, toy.canvas(toy.prompts()), toy.rollout, SEED)
    return policy, toy.graded(rollouts, torch.zeros(12, dtype=torch.bool))


def test_as_many_slices_as_steps_is_the_trajectory(toy, denoised) -> None:
    policy, batch = denoised
    model = likelihood(partial(step_map, num_slices=toy.rollout.diffusion_steps))
    prepared = model.prepare(policy, batch, SEED)
    got = model(policy, prepared, 0)
    torch.testing.assert_close(got, batch.rollouts.commit_logprob, atol=1e-5, rtol=1e-5)
    order, start = batch.rollouts.step_map, batch.rollouts.canvas.prompt_length
    for step, draw in enumerate(prepared.draws[0]):
        assert torch.equal(draw.masked[:, start:], order >= step)
        assert torch.equal(draw.score, order == step)


def test_one_slice_is_mean_field(toy, denoised) -> None:
    policy, batch = denoised
    slices, full = likelihood(partial(step_map, num_slices=1)), likelihood(mean_field)
    torch.testing.assert_close(
        slices(policy, slices.prepare(policy, batch, SEED), 0),
        full(policy, full.prepare(policy, batch, SEED), 0),
    )


@pytest.mark.parametrize("num_slices", [1, 3, 20])
def test_slices_score_each_generated_token_once_under_earlier_tokens(
    toy, hinted, num_slices: int
) -> None:
    rollouts = hinted.rollouts
    rollouts = replace(rollouts, num_steps=rollouts.num_steps - torch.arange(12) % 3)  # EOS tails
    updates = step_map(
        rollouts, SEED, num_iterations=2, num_slices=num_slices, hint_mode="condition"
    )
    order = rollouts.step_map
    generated = (order != GIVEN) & (order < rollouts.num_steps[:, None])
    for update in updates:
        assert torch.equal(torch.stack([d.score for d in update.draws]).sum(0), generated.long())
        assert torch.equal(update.counted, generated)
        for draw in update.draws:
            hidden = draw.masked[:, rollouts.canvas.prompt_length :]
            assert (hidden | ~draw.score).all()
            assert not (hidden & rollouts.canvas.frozen).any()
            first = torch.where(hidden, order, 99).amin(1, keepdim=True)
            assert torch.equal(hidden, order >= first)
    if num_slices == 3:
        assert any(
            not torch.equal(a.score, b.score)
            for a, b in zip(updates[0].draws, updates[1].draws, strict=True)
        )


def test_replay_scores_hinted_rows_in_the_given_order_and_others_in_their_own(toy, hinted) -> None:
    rollouts, length = hinted.rollouts, hinted.rollouts.canvas.frozen.shape[1]
    rows = rollouts.canvas.frozen.any(1)
    options = {"num_iterations": 1, "num_slices": length}
    (found,) = step_map(
        rollouts, SEED, hint_mode="replay", hint_order=torch.arange(length), **options
    )
    (own,) = step_map(rollouts, SEED, hint_mode="condition", **options)
    assert found.counted.all()
    assert torch.equal(found.counted[~rows], own.counted[~rows])
    for k, draw in enumerate(
        found.draws
    ):  # as many slices as steps: one token each, what is left of it visible
        hidden = draw.masked[:, rollouts.canvas.prompt_length :]
        position = torch.arange(length)
        assert torch.equal(hidden[rows], (position >= k).expand_as(hidden[rows]))
        assert torch.equal(draw.score[rows], (position == k).expand_as(hidden[rows]))
    for mine, theirs in zip(found.draws, own.draws, strict=False):
        assert torch.equal(mine.score[~rows], theirs.score[~rows])
        assert torch.equal(mine.masked[~rows], theirs.masked[~rows])


@pytest.mark.parametrize("name", ["mean_field", "random_mask", "step_map"])
def test_hint_modes(toy, hinted, name: str) -> None:
    policy, hints = toy.Policy(), hinted.rollouts.canvas.frozen
    scoring = likelihood(DRAWS[name])
    prepared = scoring.prepare(policy, hinted, SEED)
    assert (prepared.token_mask[2] & hints).any()
    if name == "step_map":  # all hints, once, from the full mask
        draw = prepared.draws[0][-1]
        assert torch.equal(draw.score, hints)
        assert draw.masked[:, hinted.rollouts.canvas.prompt_length :].all()
    visible = likelihood(partial(DRAWS[name], hint_mode="condition"))
    prepared = visible.prepare(policy, hinted, SEED)
    for inner in range(3):
        logprob = visible(policy, prepared, inner)
        assert (logprob[hints] == 0).all()
        assert not (prepared.token_mask[inner] & hints).any()
        for draw in prepared.draws[inner]:
            tokens = draw.canvas(prepared.tokens, toy.mask)
            assert (tokens[:, hinted.rollouts.canvas.prompt_length :][hints] == 4).all()


@pytest.mark.parametrize("fraction", [0.2, 0.4, 0.7, 1.0])
def test_entropy_filter_keeps_the_most_uncertain_hints(toy, hinted, fraction: float) -> None:
    policy, hints = toy.Policy(), hinted.rollouts.canvas.frozen
    model = likelihood(mean_field, entropy_filter=fraction)
    mask = model.prepare(policy, hinted, SEED).token_mask[0]
    assert mask[~hints].all()
    kept = max(1, int(5 * fraction))
    assert (mask & hints).sum(1)[list(HINTED)].tolist() == [kept] * 3
    blank = hinted.rollouts.tokens.clone()
    blank[:, hinted.rollouts.canvas.prompt_length :] = toy.mask
    logp = toy.logprobs(policy, hinted.rollouts.canvas, blank)
    entropy = -(logp.exp() * logp).sum(-1)
    for row in HINTED:
        order = entropy[row].masked_fill(~hints[row], -1).argsort(descending=True)
        assert set(order[:kept].tolist()) == set((mask & hints)[row].nonzero()[:, 0].tolist())


def test_scoring_can_stop_at_the_first_eos(toy, batch) -> None:
    rollouts, policy = batch.rollouts, toy.Policy()
    tokens = rollouts.tokens.clone()
    tokens[0, rollouts.canvas.prompt_length + 4 :] = toy.eos
    tokens[1, rollouts.canvas.prompt_length] = toy.eos
    batch = replace(batch, rollouts=replace(rollouts, tokens=tokens))
    model = likelihood(mean_field, mask_after_eos=True)
    prepared = model.prepare(policy, batch, SEED)
    assert prepared.token_mask[0].sum(1).tolist() == [5, 1] + [toy.length] * 10
    assert torch.equal(model(policy, prepared, 0) != 0, prepared.token_mask[0])
    canvas = replace(rollouts.canvas, eos_id=None)
    batch = replace(batch, rollouts=replace(rollouts, canvas=canvas))
    with pytest.raises(ValueError, match="mask_after_eos must have an eos_id on the canvas"):
        model.prepare(policy, batch, SEED)


@pytest.mark.parametrize(("num_iterations", "slots"), [(4, 8), (12, 2), (3, 5), (1, 3)])
def test_every_slot_meets_every_inner_draw_once(
    toy, batch, num_iterations: int, slots: int
) -> None:
    """The loop of a training step: inner updates outside, micro-batches inside (no step modulo mu)."""
    policy = toy.Policy()
    model = likelihood(DRAWS["prompt_masks"], num_iterations=num_iterations, batch_size=12)
    prepared = model.prepare(policy, batch, SEED)
    policy.forwards.clear()
    rows = torch.arange(12).tensor_split(slots)
    for inner in range(num_iterations):
        for slot in rows:
            model(policy, take(prepared, slot), inner)
    for index, slot in enumerate(rows):
        seen = policy.forwards[index::slots]
        expected = [draws[0].canvas(prepared.tokens, toy.mask)[slot] for draws in prepared.draws]
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    distinct = {tuple(draws[0].masked.flatten().tolist()) for draws in prepared.draws}
    assert len(distinct) == num_iterations


def test_padding_changes_nothing(toy) -> None:
    policy, problems = toy.Policy(), toy.prompts()
    together = toy.graded(toy.rolled(toy.canvas(problems)), torch.zeros(12, dtype=torch.bool))
    alone_canvas = toy.canvas(problems[:1])
    start = together.rollouts.canvas.prompt_length - alone_canvas.prompt_length
    assert start > 0
    rollouts = toy.rolled(alone_canvas)
    rollouts = replace(rollouts, tokens=together.rollouts.tokens[:4, start:])
    alone = toy.graded(rollouts, torch.zeros(4, dtype=torch.bool))
    model = likelihood(mean_field)
    torch.testing.assert_close(
        model(policy, model.prepare(policy, alone, SEED), 0),
        model(policy, model.prepare(policy, together, SEED), 0)[:4],
    )


def test_rows_without_anything_to_score_stay_in_the_graph(toy, batch) -> None:
    policy, model = toy.Policy(), likelihood(mean_field)
    prepared = model.prepare(policy, batch, SEED)
    draw = replace(prepared.draws[0][0], score=torch.zeros_like(prepared.draws[0][0].score))
    policy.forwards.clear()
    logprob = model(policy, replace(prepared, draws=((draw,),) * 3), 0)
    logprob.sum().backward()
    assert (logprob == 0).all()
    assert policy.weight.grad is not None
    assert (policy.weight.grad == 0).all()
    assert [len(tokens) for tokens in policy.forwards] == [1]


def test_rows_a_draw_does_not_score_are_not_forwarded(toy, hinted) -> None:
    policy, model = toy.Policy(), likelihood(DRAWS["step_map"], batch_size=12)
    prepared = model.prepare(policy, hinted, SEED)
    policy.forwards.clear()
    model(policy, prepared, 0)
    assert [len(tokens) for tokens in policy.forwards] == [12, 12, 12, len(HINTED)]


def test_weights_multiply_and_draws_add_up(toy, batch) -> None:
    policy, model = toy.Policy(), likelihood(mean_field)
    prepared = model.prepare(policy, batch, SEED)
    (draw,) = prepared.draws[0]
    weight = torch.rand(draw.score.shape)
    both = replace(prepared, draws=((replace(draw, weight=weight), draw),))
    torch.testing.assert_close(model(policy, both, 0), (1 + weight) * model(policy, prepared, 0))


def test_float64_is_kept(toy, batch) -> None:
    policy, model = toy.Policy(dtype=torch.float64), likelihood(mean_field)
    assert model(policy, model.prepare(policy, batch, SEED), 0).dtype == torch.float64
