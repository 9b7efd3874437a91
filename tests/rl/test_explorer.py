from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from igpo.config import InpaintConfig
from igpo.rl.advantage import centred
from igpo.rl.explorer import (
    SECOND_ATTEMPT,
    InpaintingExplorer,
    TraceExplorer,
    max_replaced,
    no_exploration,
    original_layout,
    triggered_groups,
)
from igpo.rollout import denoise, pseudo_order
from igpo.types import GIVEN, Seed, take

SEED = Seed(5).at(7)
CFG = InpaintConfig(chunk_min=2, chunk_max=3)


@pytest.fixture
def world(toy):
    """world(correct groups, attempt verdict, cfg, prompts) -> what a step sees before and after exploring."""

    def run(correct_groups=(1,), verdict=None, cfg=CFG, prompts=None, groups=3):
        prompts = toy.prompts(groups) if prompts is None else prompts
        policy, canvas = toy.Policy(), toy.canvas(prompts)
        rollouts = denoise(policy, canvas, toy.rollout, SEED)
        correct = torch.zeros(len(canvas.row_ids), dtype=torch.bool)
        for group in correct_groups:
            correct[group * toy.group] = True
        before = toy.graded(rollouts, correct)
        grade = toy.grader(verdict or (lambda r: torch.ones(len(r.tokens), dtype=torch.bool)))
        explorer = InpaintingExplorer(cfg, toy.rollout, grade, original_layout)
        return before, explorer(policy, prompts, before, SEED), grade, prompts

    return run


def first_of_group(count: int):
    """A verdict: the first `count` rows of each group are correct."""
    return lambda rollouts: (rollouts.canvas.row_ids % SECOND_ATTEMPT % 2**20) < count


def assert_rows_equal(left, right, rows, *, exact: bool = True) -> None:
    """exact: log-probs bitwise, too; False where the policy ran on batches of different sizes."""
    left, right = take(left, rows), take(right, rows)
    for name in ("rewards", "correct", "rescued", "completions"):
        a, b = getattr(left, name), getattr(right, name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    for name in ("tokens", "step_map", "num_steps"):
        assert torch.equal(getattr(left.rollouts, name), getattr(right.rollouts, name)), name
    for name in ("commit_logprob", "commit_entropy"):
        a, b = getattr(left.rollouts, name), getattr(right.rollouts, name)
        assert torch.equal(a, b) if exact else torch.allclose(a, b, atol=1e-5), name
    for name in ("tokens", "frozen", "row_ids", "group_ids"):
        assert torch.equal(
            getattr(left.rollouts.canvas, name), getattr(right.rollouts.canvas, name)
        )


def test_triggers_per_group_and_leaves_the_others_bitwise(world, toy) -> None:
    before, after, grade, _ = world(correct_groups=(1,))
    assert [len(seen.tokens) for seen in grade.seen] == [2 * toy.group]
    assert grade.seen[0].canvas.group_ids.unique().tolist() == [0, 2]
    assert not after.rescued[toy.group : 2 * toy.group].any()
    assert_rows_equal(before, after, (~after.rescued).nonzero()[:, 0])


@pytest.mark.parametrize(
    ("num_correct", "replaced", "right", "wrong"), [(4, 2, 0.5, -0.5), (1, 1, 0.75, -0.25), (0, 0, 0, 0)]
)  # fmt: skip
def test_replaces_at_most_half_of_an_all_wrong_group(
    world, num_correct: int, replaced: int, right: float, wrong: float
) -> None:
    _, after, _, _ = world(correct_groups=(1, 2), verdict=first_of_group(num_correct))
    assert int(after.rescued.sum()) == replaced
    assert torch.equal(after.correct[:4], after.rescued[:4])
    advantages = centred(after)[:4]
    expected = torch.where(after.rescued[:4], torch.tensor(right), torch.tensor(wrong))
    assert torch.equal(advantages, expected.float())


@pytest.mark.parametrize(
    ("num_correct", "positive", "negative"), [(5, 0.5, -0.5), (2, 0.75, -0.25)]
)
def test_golden_advantages_of_eight(
    toy, num_correct: int, positive: float, negative: float
) -> None:
    prompts = toy.prompts(1)
    policy, canvas = toy.Policy(), toy.canvas(prompts, 8)
    before = toy.graded(toy.rolled(canvas), torch.zeros(8, dtype=torch.bool))
    explorer = InpaintingExplorer(
        CFG, toy.rollout, toy.grader(first_of_group(num_correct)), original_layout
    )
    advantages = centred(explorer(policy, prompts, before, SEED)).tolist()
    count = min(4, num_correct)
    assert sorted(advantages) == [negative] * (8 - count) + [positive] * count


def test_replaced_rows_are_verified_rows_of_the_attempt(world, toy) -> None:
    _, after, grade, _ = world(verdict=first_of_group(3))
    attempt = grade.seen[0]
    known = {int(row): i for i, row in enumerate(attempt.canvas.row_ids)}
    for row in after.rescued.nonzero()[:, 0].tolist():
        source = known[int(after.rollouts.canvas.row_ids[row])]
        assert after.correct[row]
        assert torch.equal(after.rollouts.tokens[row], attempt.tokens[source])
        assert torch.equal(after.rollouts.canvas.frozen[row], attempt.canvas.frozen[source])
        assert attempt.canvas.group_ids[source] == after.rollouts.canvas.group_ids[row]
    assert after.rollouts.canvas.row_ids.unique().numel() == 3 * toy.group


def test_hints_are_the_trace_and_are_never_changed(world) -> None:
    _, _, grade, prompts = world()
    (attempt,) = grade.seen
    frozen, completion = attempt.canvas.frozen, attempt.completion
    assert frozen.any()
    for row, group in enumerate(attempt.canvas.group_ids.tolist()):
        columns = frozen[row].nonzero()[:, 0].tolist()
        trace = prompts[group].trace_ids
        assert all(column < prompts[group].hint_length for column in columns)
        assert [int(completion[row, c]) for c in columns] == [trace[c] for c in columns]
    assert torch.equal(attempt.step_map == GIVEN, frozen)
    assert not (completion == attempt.canvas.mask_id).any()


def test_ratio_one_shows_everything_but_the_answer(world) -> None:
    _, after, grade, prompts = world(cfg=replace(CFG, eta_low=1.0, eta_high=1.0))
    expected = torch.arange(grade.seen[0].canvas.frozen.shape[1]) < prompts[0].hint_length
    assert torch.equal(grade.seen[0].canvas.frozen, expected.expand_as(grade.seen[0].canvas.frozen))
    assert after.metrics["inpaint/hint_fraction"] == pytest.approx(12 / 16)


def test_ratio_zero_resamples_without_hints_or_traces(world, toy) -> None:
    bare = [replace(p, trace=None, trace_ids=(), hint_length=0) for p in toy.prompts(3)]
    cfg = replace(CFG, eta_low=0.0, eta_high=0.0)
    before, after, grade, _ = world(cfg=cfg, prompts=bare)
    (attempt,) = grade.seen
    assert not attempt.canvas.frozen.any()
    rows = (before.rollouts.canvas.group_ids != 1).nonzero()[:, 0]
    assert torch.equal(attempt.canvas.tokens, before.rollouts.canvas.tokens[rows])
    assert not torch.equal(attempt.tokens, before.rollouts.tokens[rows])
    assert int(after.rescued.sum()) == 4


def test_a_prompt_without_trace_is_left_alone_and_counted(world, toy) -> None:
    prompts = toy.prompts(3)
    prompts[0] = replace(prompts[0], trace=None, trace_ids=(), hint_length=0)
    before, after, grade, _ = world(correct_groups=(), prompts=prompts)
    assert grade.seen[0].canvas.group_ids.unique().tolist() == [1, 2]
    assert_rows_equal(before, after, torch.arange(toy.group))
    assert after.metrics["inpaint/groups_without_trace"] == 1
    assert after.metrics["inpaint/attempt_rate"] == pytest.approx(2 / 3)


def test_the_cost_and_the_counts_are_reported(world, toy) -> None:
    before, after, grade, _ = world(verdict=first_of_group(1))
    spent = before.rollouts.num_forwards + grade.seen[0].num_forwards
    assert after.rollouts.num_forwards == spent > before.rollouts.num_forwards
    got = {k.removeprefix("inpaint/"): v for k, v in after.metrics.items() if "inpaint" in k}
    assert got["groups_all_wrong"] == got["attempt_rate"] == pytest.approx(2 / 3)
    assert (got["success_rate"], got["replaced"], got["attempt_correct"]) == (1, 2, 0.25)
    assert got["hint_fraction"] == float(grade.seen[0].canvas.frozen.float().mean())
    assert after.metrics["reward"] == before.metrics["reward"]
    idle = no_exploration(toy.Policy(), (), before, SEED)
    assert idle.metrics["inpaint/groups_all_wrong"] == got["groups_all_wrong"]


@pytest.mark.parametrize("quiet", ["all groups have a correct row", "lambda 0", "no trace"])
def test_no_second_rollout_where_nothing_can_come_of_it(world, toy, quiet: str) -> None:
    options = {
        "all groups have a correct row": {"correct_groups": (0, 1, 2)},
        "lambda 0": {"cfg": replace(CFG, replace_fraction=0.0)},
        "no trace": {"prompts": [replace(p, hint_length=0) for p in toy.prompts(3)]},
    }
    before, after, grade, _ = world(**options[quiet])
    assert not grade.seen
    assert after.metrics["inpaint/attempt_rate"] == 0
    assert after.rollouts is before.rollouts


def test_total_reward_leaves_groups_that_a_format_reward_tells_apart(world, toy) -> None:
    before, _, _, _ = world(correct_groups=())
    rewards = torch.zeros_like(before.rewards)
    rewards[:4] = torch.tensor([0.25, 0.0, 0.0, 0.0])
    rewards[4:8] = 0.25
    mixed = replace(before, rewards=rewards)
    assert list(triggered_groups(mixed, "correctness")) == [0, 1, 2]
    assert list(triggered_groups(mixed, "total_reward")) == [1, 2]
    mixed.correct[4:8] = True
    assert list(triggered_groups(mixed, "total_reward")) == [2]


def test_first_order_overwrites_the_first_rows(world) -> None:
    _, after, _, _ = world(cfg=replace(CFG, replace_order="first"), correct_groups=(1,))
    assert after.rescued.tolist() == [True, True, False, False] + [False] * 4 + [
        True,
        True,
        False,
        False,
    ]


def test_random_order_depends_on_the_seed_and_reaches_every_row(world, toy) -> None:
    prompts, policy = toy.prompts(1), toy.Policy()
    before = toy.graded(toy.rolled(toy.canvas(prompts)), torch.zeros(4, dtype=torch.bool))
    grade = toy.grader(lambda r: torch.ones(len(r.tokens), dtype=torch.bool))
    explorer = InpaintingExplorer(CFG, toy.rollout, grade, original_layout)
    seen = torch.stack(
        [explorer(policy, prompts, before, Seed(1).at(s)).rescued for s in range(12)]
    )
    assert (seen.sum(1) == 2).all()
    assert seen.any(0).all()
    assert len({tuple(row.tolist()) for row in seen}) > 2


def test_a_group_is_explored_the_same_in_any_batch(toy) -> None:
    prompts, policy = toy.prompts(3), toy.Policy()
    grade = toy.grader(first_of_group(2))
    explorer = InpaintingExplorer(CFG, toy.rollout, grade, original_layout)
    batch = toy.graded(toy.rolled(toy.canvas(prompts)), torch.zeros(12, dtype=torch.bool))
    together = explorer(policy, prompts, batch, SEED)
    alone = explorer(policy, prompts, take(batch, torch.arange(4, 8)), SEED)
    assert_rows_equal(take(together, torch.arange(4, 8)), alone, torch.arange(4), exact=False)


def test_hint_ratios_stay_in_range_and_differ_by_row(world) -> None:
    _, _, grade, prompts = world(correct_groups=(), cfg=replace(CFG, chunk_min=1, chunk_max=1))
    counts = grade.seen[0].canvas.frozen.sum(1)
    hint_length = prompts[0].hint_length
    assert counts.min() >= int(0.2 * hint_length)
    assert counts.max() <= int(0.6 * hint_length)
    assert counts.unique().numel() > 2


def test_floor_of_the_fraction_is_meant_in_decimals() -> None:
    assert [max_replaced(f, g) for f, g in ((0.5, 7), (0.29, 100), (0.3, 10), (1.0, 4))] == [
        3,
        29,
        3,
        4,
    ]


@pytest.fixture
def traced(toy):
    def run(verdict, prompts=None):
        prompts = toy.prompts(2) if prompts is None else prompts
        before = toy.graded(toy.rolled(toy.canvas(prompts)), torch.zeros(8, dtype=torch.bool))
        explorer = TraceExplorer(CFG, toy.rollout, toy.grader(verdict), toy.pad)
        return before, explorer(toy.Policy(), prompts, before, SEED), prompts

    return run


def test_trace_rows_are_the_trace_and_eos(traced, toy) -> None:
    before, after, prompts = traced(lambda r: torch.ones(len(r.tokens), dtype=torch.bool))
    assert after.rescued.view(2, 4).sum(1).tolist() == [2, 2]
    for row in after.rescued.nonzero()[:, 0].tolist():
        trace = prompts[row // 4].trace_ids
        assert after.rollouts.completion[row].tolist() == [*trace, toy.eos, toy.eos]
        assert torch.equal(after.rollouts.step_map[row], pseudo_order(toy.length, toy.rollout))
    assert not after.rollouts.canvas.frozen.any()
    assert after.rollouts.num_forwards == before.rollouts.num_forwards
    assert_rows_equal(before, after, (~after.rescued).nonzero()[:, 0])


def test_traces_as_hints_are_the_same_rows_marked_as_given(traced, toy) -> None:
    before, after, prompts = traced(lambda r: torch.ones(len(r.tokens), dtype=torch.bool))
    explorer = TraceExplorer(
        CFG,
        toy.rollout,
        toy.grader(lambda r: torch.ones(len(r.tokens), dtype=torch.bool)),
        toy.pad,
        as_hints=True,
    )
    marked = explorer(toy.Policy(), prompts, before, SEED)
    assert torch.equal(marked.rollouts.tokens, after.rollouts.tokens)
    assert torch.equal(marked.rollouts.step_map, after.rollouts.step_map)
    frozen = marked.rollouts.canvas.frozen
    assert torch.equal(frozen.all(1), marked.rescued)
    assert torch.equal(frozen.any(1), marked.rescued)


def test_trace_rows_must_be_accepted_and_must_fit(traced, toy) -> None:
    before, after, _ = traced(lambda r: r.canvas.group_ids == 1)
    assert after.rescued.view(2, 4).sum(1).tolist() == [0, 2]
    assert after.metrics["inpaint/success_rate"] == 0.5
    long = [replace(p, trace_ids=(1,) * (toy.length + 1)) for p in toy.prompts(2)]
    before, after, _ = traced(lambda r: torch.ones(len(r.tokens), dtype=torch.bool), long)
    assert after.rollouts is before.rollouts
    assert after.metrics["inpaint/groups_without_trace"] == 2


def test_pseudo_order_follows_the_transfer_schedule(toy) -> None:
    cfg = replace(toy.rollout, block_length=8, diffusion_steps=6)  # 3 steps for 8: 3, 3, 2
    assert (
        pseudo_order(16, cfg).tolist() == [0] * 3 + [1] * 3 + [2] * 2 + [3] * 3 + [4] * 3 + [5] * 2
    )
