"""Log-probs over the tokens that top-k, top-p and min-p left: the op, the likelihoods, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from steps import COMMON, SEED
from torch.utils._python_dispatch import TorchDispatchMode

from igpo.ops import _support
from igpo.ops._support import support_logprob
from igpo.rl.algorithms import build_algorithm
from igpo.rollout import denoise
from igpo.types import put, take

FILTERED = {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "temperature": 0.7, "record_support": True}


def case(rows: int, ids: int, dtype: torch.dtype = torch.float64, vocab: int = 37, width: int = 7):
    generator = torch.Generator().manual_seed(rows + ids)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    support = torch.stack([torch.randperm(vocab, generator=generator)[:ids] for _ in range(rows)])
    kept = torch.randint(1, ids + 1, (rows, 1), generator=generator)
    support = support.masked_fill(torch.arange(ids) >= kept, -1).int()
    place = (torch.rand(rows, 1, generator=generator) * kept).long()
    targets = support.gather(1, place)[:, 0].long()
    return draw(rows, width), draw(vocab, width), draw(vocab), targets, support


def expected(hidden, weight, bias, targets, support, temperature):
    """By the whole vocabulary, -inf outside the support."""
    z = (hidden @ weight.T + bias) / temperature
    outside = torch.ones(z.shape, dtype=torch.bool)
    for row, ids in enumerate(support.tolist()):
        outside[row, [i for i in ids if i >= 0]] = False
    logprob = z.masked_fill(outside, -torch.inf).log_softmax(-1)
    p = logprob.exp()
    entropy = -(p * logprob.masked_fill(outside, 0.0)).sum(-1)
    return logprob.gather(1, targets[:, None])[:, 0], entropy


@pytest.mark.parametrize(("rows", "ids"), [(11, 5), (1, 37), (3, 1)])
@pytest.mark.parametrize("gathered", [1, 80, 1 << 24])
def test_matches_the_softmax_over_all_and_its_gradients(
    rows: int, ids: int, gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_support, "GATHERED", gathered)
    hidden, weight, bias, targets, support = case(rows, ids)
    found, wanted = [], []
    for into in (found, wanted):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        h, w, b = leaves
        if into is found:
            values = support_logprob(h, w, targets, support, bias=b, temperature=0.6)
        else:
            values = expected(h, w, b, targets, support, 0.6)
        factor = torch.arange(1, rows + 1, dtype=torch.float64)
        (factor * values[0] - factor.flip(0) * values[1]).sum().backward()
        into += [*(x.detach() for x in values), *(x.grad for x in leaves)]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_bfloat16_is_summed_in_float32() -> None:
    hidden, weight, bias, targets, support = case(50, 9, torch.bfloat16, width=64)
    truth = expected(hidden.double(), weight.double(), bias.double(), targets, support, 1.0)
    ours = support_logprob(hidden, weight, targets, support, bias=bias)
    for mine, true in zip(ours, truth, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), true, atol=1e-5, rtol=1e-5)


def test_no_rows_and_a_token_that_was_not_there() -> None:
    hidden, weight, bias, targets, support = case(4, 3)
    empty = support_logprob(hidden[:0], weight, targets[:0], support[:0], bias=bias)
    assert [x.shape for x in empty] == [(0,), (0,)]
    with pytest.raises(AssertionError, match="one of those it was drawn from"):
        support_logprob(
            hidden, weight, targets, torch.full_like(support, 36).masked_fill(support < 0, -1)
        )


def test_nothing_of_the_size_of_the_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_support, "GATHERED", 4096)
    hidden, weight, _, targets, support = case(200, 8, vocab=2000, width=16)
    hidden.requires_grad_()
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            made = [
                x
                for x in (out if isinstance(out, (tuple, list)) else (out,))
                if isinstance(x, torch.Tensor)
            ]
            views = [weight.untyped_storage().data_ptr()]
            largest = max(
                [largest, *(x.numel() for x in made if x.untyped_storage().data_ptr() not in views)]
            )
            return out

    with Watch():
        support_logprob(hidden, weight, targets, support)[0].sum().backward()
    assert largest <= 4096 < 200 * 8 * 16 < 200 * 2000


REPLAYING = {
    "step_mc": {"objective": "clip_draws", "draws": replace(COMMON.draws, num_draws=8)},
    "slices": {"draws": replace(COMMON.draws, shrink=1)},
    "step_map": {"draws": replace(COMMON.draws, num_slices=12)},
    "block_exact": {},
}


def scored(toy, likelihood: str, **changes):
    """Rollouts with filters on the toy policy, and the algorithm that scores them."""
    options = {**REPLAYING[likelihood], **changes}
    draws = replace(
        options.pop("draws", COMMON.draws), likelihood_temperature=FILTERED["temperature"]
    )
    cfg = replace(
        COMMON, algorithm="grpo", likelihood=likelihood, num_iterations=1, draws=draws, **options
    )
    rollout = replace(toy.rollout, **FILTERED)
    algorithm = build_algorithm(
        cfg, rollout, toy.grader(lambda r: r.completion[:, 0] > 4), pad_id=toy.pad
    )
    policy = (toy.BlockPolicy if algorithm.likelihood.block_length else toy.Policy)(
        dtype=torch.float64
    )
    return cfg, rollout, algorithm, policy


@pytest.mark.parametrize("likelihood", REPLAYING)
def test_the_log_prob_of_a_draw_is_what_it_was_at_its_commit(toy, likelihood: str) -> None:
    _, rollout, algorithm, policy = scored(toy, likelihood)
    assert algorithm.likelihood.on_support
    rollouts = denoise(policy, toy.canvas(toy.prompts()), rollout, SEED)
    graded = toy.graded(rollouts, torch.ones(12, dtype=torch.bool))
    batch = algorithm.likelihood.prepare(policy, graded, SEED)
    value = algorithm.likelihood(policy, batch, 0)
    read = batch.token_mask[0]
    assert read.any()
    assert likelihood == "step_mc" or read.all()
    committed = rollouts.commit_logprob.double()
    if likelihood == "step_mc":
        committed = committed[:, None].expand_as(value)
    torch.testing.assert_close(value[read], committed[read], atol=2e-6, rtol=2e-6)
    over_all = replace(algorithm.likelihood, on_support=False)
    wider = over_all(policy, over_all.prepare(policy, graded, SEED), 0)
    assert (wider[read] < value[read] - 1e-4).double().mean() > 0.5


def test_hints_are_scored_over_all_tokens(toy) -> None:
    """A row with hints, which were not drawn, beside rows without."""
    _, rollout, algorithm, policy = scored(toy, "slices")
    rollouts = denoise(policy, toy.canvas(toy.prompts()), rollout, SEED)
    frozen = torch.zeros_like(rollouts.canvas.frozen)
    frozen[3, 4:9] = True
    assert rollouts.support is not None
    hinted = replace(
        rollouts, canvas=replace(rollouts.canvas, frozen=frozen),
        step_map=rollouts.step_map.masked_fill(frozen, -1),
        support=rollouts.support.masked_fill(frozen[..., None], -1),
    )  # fmt: skip
    rollouts = put(rollouts, torch.tensor([3]), take(hinted, torch.tensor([3])))
    batch = algorithm.likelihood.prepare(policy, toy.graded(rollouts, frozen[:, 0]), SEED)
    value = algorithm.likelihood(policy, batch, 0)
    canvas = rollouts.canvas
    full = rollouts.tokens.clone()
    full[:, canvas.prompt_length :] = toy.mask
    logits = (
        policy.hidden(full, canvas.attention_mask, canvas.position_ids) @ policy.weight.T
        + policy.bias
    )
    over_all = (logits[:, canvas.prompt_length :] / FILTERED["temperature"]).log_softmax(-1)
    wanted = over_all.gather(-1, rollouts.completion[..., None])[..., 0]
    torch.testing.assert_close(value[3, 4:9], wanted[3, 4:9])


@pytest.mark.parametrize(
    ("change", "rollout", "message"),
    [
        ({"likelihood": "mean_field"}, {}, "likelihood must score tokens where they were drawn.*'top_k': 5.*"
         "got 'mean_field'. Set likelihood=step_mc, block_exact, or slices with shrink=1. Or .*=ignore"),
        ({"likelihood": "elbo", "importance_sampling_level": "sequence"}, {}, "likelihood must score tokens where"),
        ({"likelihood": "slices"}, {}, "got 'slices'. Set shrink=1"),
        ({"likelihood": "step_map"}, {}, "got 'step_map'. Set num_slices=12"),
        ({"likelihood": "block_exact"}, {"record_support": False}, "record_support must be true.*_support=true. Or"),
        ({"likelihood": "block_exact"}, {"record_support": False, "top_k": 0}, "Set record_support=true and top_k"),
        ({"draws": replace(COMMON.draws, filtered_scoring="no")}, {}, "filtered_scoring must be one of support"),
    ],
)  # fmt: skip
def test_another_distribution_than_the_one_sampled_is_refused(
    toy, change: dict, rollout: dict, message: str
) -> None:
    cfg = replace(COMMON, algorithm="grpo", **change)
    filtered = replace(toy.rollout, **{**FILTERED, **rollout})
    with pytest.raises(ValueError, match=message):
        build_algorithm(cfg, filtered, toy.grader(None), pad_id=toy.pad)
    plain = replace(cfg, draws=replace(cfg.draws, filtered_scoring="ignore"))
    assert not build_algorithm(
        plain, filtered, toy.grader(None), pad_id=toy.pad
    ).likelihood.on_support
    if "filtered" not in message:
        unfiltered = build_algorithm(cfg, toy.rollout, toy.grader(None), pad_id=toy.pad)
        assert not unfiltered.likelihood.on_support


def test_predictions_are_drawn_from_all_tokens(toy) -> None:
    cfg = replace(COMMON, algorithm="mdpo")
    filtered = replace(toy.rollout, **FILTERED)
    assert not build_algorithm(
        cfg, filtered, toy.grader(None), pad_id=toy.pad
    ).likelihood.on_support


def test_rollouts_without_a_support_are_refused(toy) -> None:
    _, _, algorithm, policy = scored(toy, "slices")
    rollouts = denoise(policy, toy.canvas(toy.prompts()), toy.rollout, SEED)
    with pytest.raises(
        ValueError, match=r"rollouts must have a support.*Roll out with record_support=true"
    ):
        algorithm.likelihood.prepare(
            policy, toy.graded(rollouts, torch.ones(12, dtype=torch.bool)), SEED
        )
