"""DiPO: one pass for a denoise step of all blocks, against decoding block by block with the recorded step map."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from public_configs import MASK, PAD, public_model
from torch import Tensor

from igpo.canvas import masked_canvases, with_hints
from igpo.config import AlgorithmConfig, RolloutConfig
from igpo.models import MaskedDecoder
from igpo.rl.algorithms import Algorithm, build_algorithm
from igpo.rl.gradient import accumulate
from igpo.rollout import denoise
from igpo.types import GIVEN, Graded, PolicyBatch, Prompt, Rollouts, Seed

L, WIDTH, SEED = 8, 4, Seed(6).at(1)
LENGTHS = (6, 8, 3)  # the last prompt tokens share the first block, or do not
ROLLOUT = RolloutConfig(
    max_completion_length=L, block_length=WIDTH, diffusion_steps=8, temperature=1.0, early_stop=False
)  # fmt: skip
CFG = AlgorithmConfig(
    algorithm="dipo", num_generations=2, num_iterations=2, scale_rewards="group", importance_sampling_level="token",
    epsilon=0.2, epsilon_high=0.28, beta=0.1, loss_type="bnpo",
)  # fmt: skip


@pytest.fixture(scope="module")
def policy() -> MaskedDecoder:
    return public_model("sdar").double()


def moved(policy: MaskedDecoder, by: float) -> MaskedDecoder:
    policy = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(by)
    return policy


def rolled(
    policy: MaskedDecoder, *, steps: int = 8, hints: bool = False, eos: bool = False
) -> Rollouts:
    """eos: what row 0 wrote at its second place is called EOS, and it stops."""
    prompts = [
        Prompt("", tuple((torch.arange(n) * 13 % 90 + 10).tolist()), i)
        for i, n in enumerate(LENGTHS)
    ]
    canvas = masked_canvases(
        prompts, num_generations=2, completion_length=L, mask_id=MASK, pad_id=PAD, eos_id=2
    )
    if hints:
        where = torch.zeros(len(canvas.tokens), L, dtype=torch.bool)
        where[1, 1:4], where[4, 5] = True, True
        canvas = with_hints(canvas, torch.full_like(canvas.completion, 77), where)
    cfg = replace(ROLLOUT, diffusion_steps=steps)
    first = denoise(policy, canvas, cfg, SEED)
    if not eos:
        return first
    canvas = replace(canvas, eos_id=int(first.completion[0, 1]))
    return denoise(policy, canvas, replace(cfg, early_stop=True), SEED)


def graded(rollouts: Rollouts) -> Graded:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0, 1.0])
    none = torch.zeros(6, dtype=torch.bool)
    return Graded(rollouts, rewards, rewards > 0.9, none, ("",) * 6)


def built(likelihood: str = "block_exact", **changes) -> Algorithm:
    cfg = replace(CFG, likelihood=likelihood, **changes)
    return build_algorithm(cfg, ROLLOUT, lambda rollouts, prompts: graded(rollouts), pad_id=PAD)


def replayed(policy: MaskedDecoder, rollouts: Rollouts) -> Tensor:
    """(B, L) log p of every token when it was committed, by one forward per recorded step; 0 where nothing was."""
    rows = []
    for b, order in enumerate(rollouts.step_map):
        real = rollouts.canvas.attention_mask[b]
        tokens, prompt = rollouts.tokens[b][real], int(real.sum()) - L
        steps = torch.cat((torch.full((prompt,), GIVEN), order))
        found = torch.zeros(len(tokens), dtype=torch.float64)
        for step in range(int(rollouts.num_steps[b])):
            place = (steps == step).nonzero()[:, 0]
            if len(place):
                end = (int(place[0]) // WIDTH + 1) * WIDTH
                here = tokens[:end].masked_fill(steps[:end] >= step, MASK)
                logp = policy(here[None]).logits[0].log_softmax(-1)
                found = found.index_put((place,), logp[place, tokens[place]])
        rows.append(found[prompt:])
    return torch.stack(rows)


def written(rollouts: Rollouts) -> Tensor:
    order = rollouts.step_map
    return (order != GIVEN) & (order < rollouts.num_steps[:, None])


def passes(policy: MaskedDecoder, batch: PolicyBatch, algorithm: Algorithm) -> tuple[Tensor, int]:
    count = []
    handle = policy.embed_tokens.register_forward_hook(lambda *_: count.append(1))
    value = algorithm.likelihood(policy, batch, 0)
    handle.remove()
    return value, len(count)


@pytest.mark.parametrize(
    ("steps", "options", "expected"),
    [(8, {}, 4), (4, {}, 2), (2, {}, 1), (4, {"hints": True}, 2), (8, {"eos": True}, 4)],
    ids=["one token a step", "two", "a block at once", "hints", "early stop"],
)
@torch.no_grad()
def test_as_many_passes_as_a_block_has_steps_and_the_log_probs_of_decoding(
    policy: MaskedDecoder, steps: int, options: dict, expected: int
) -> None:
    rollouts = rolled(policy, steps=steps, **options)
    algorithm = build_algorithm(
        replace(CFG, hint_mode="condition"), replace(ROLLOUT, diffusion_steps=steps),
        lambda rollouts, prompts: graded(rollouts), pad_id=PAD,
    )  # fmt: skip
    batch = algorithm.likelihood.prepare(policy, graded(rollouts), SEED, lambda: reference(policy))
    found, count = passes(policy, batch, algorithm)
    assert count == expected == len(batch.draws[0])
    assert (rollouts.num_steps < steps).any() == options.get("eos", False)
    torch.testing.assert_close(found, replayed(policy, rollouts), rtol=0, atol=1e-10)
    assert torch.equal(batch.token_mask[0], written(rollouts))
    assert torch.equal(found != 0, written(rollouts))


@contextmanager
def reference(policy: MaskedDecoder):
    yield policy


@torch.no_grad()
def test_hints_are_read_from_a_masked_block_behind_finished_ones(policy: MaskedDecoder) -> None:
    rollouts = rolled(policy, hints=True)
    algorithm = built(beta=0.0)
    batch = algorithm.likelihood.prepare(policy, graded(rollouts), SEED)
    found = algorithm.likelihood(policy, batch, 0)
    hint = rollouts.step_map == GIVEN
    # row 1: 6 prompt tokens, so its hints at 1:4 are token 7 of block 1 and tokens 8, 9 of block 2
    whole = rollouts.tokens[1][rollouts.canvas.attention_mask[1]]
    for start, places in ((4, [7]), (8, [8, 9])):
        here = whole[: start + WIDTH].clone()
        here[max(start, 6) :] = MASK
        logp = policy(here[None]).logits[0].log_softmax(-1)
        for place in places:
            expected = logp[place, whole[place]]
            torch.testing.assert_close(found[1, place - 6], expected, rtol=0, atol=1e-10)
    assert torch.equal(found != 0, torch.ones_like(hint))


@pytest.mark.parametrize("constant_memory", [True, False])
def test_loss_and_gradient_are_those_of_the_equation(
    policy: MaskedDecoder, constant_memory: bool
) -> None:
    """-(sum_i sum_k [min(rho A, clip(rho, .8, 1.28) A) - beta k3]) / sum_i |tau_i|, on log-probs of decoding."""
    new, ref = moved(policy, 1.1), moved(policy, 0.95)
    rollouts = rolled(policy, eos=True)
    algorithm = built(constant_memory=constant_memory)
    advantages = algorithm.advantage(graded(rollouts))
    batch = algorithm.likelihood.prepare(policy, graded(rollouts), SEED, lambda: reference(ref))
    parts = accumulate(
        algorithm, new, batch, advantages, 1, algorithm.objective.rows(advantages), 4
    )
    value = sum(loss for loss, _ in parts)
    found = {name: p.grad.clone() for name, p in new.named_parameters() if p.grad is not None}
    new.zero_grad()

    with torch.no_grad():
        old, other = replayed(policy, rollouts), replayed(ref, rollouts)
    x, A, scored = replayed(new, rollouts), advantages.double()[:, None], written(rollouts)
    rho, delta = (x - old).exp(), other - x
    assert ((rho > 1.28) & (A > 0) & scored).any(), "something is clipped"
    terms = torch.minimum(rho * A, rho.clamp(0.8, 1.28) * A) - 0.1 * (delta.exp() - 1 - delta)
    loss = -(terms * scored).sum() / scored.sum()
    assert value == pytest.approx(loss.item(), abs=1e-9)
    loss.backward()
    expected = {name: p.grad for name, p in new.named_parameters() if p.grad is not None}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-9, msg=name)


def test_on_policy_the_gradient_is_reinforce_by_tokens(policy: MaskedDecoder) -> None:
    """Equation 7: with the policy as its own old one, -sum_i A_i sum_k log p / sum_i |tau_i|."""
    new, rollouts = copy.deepcopy(policy), rolled(policy)
    algorithm = built(beta=0.0, num_iterations=1)
    advantages = algorithm.advantage(graded(rollouts))
    batch = algorithm.likelihood.prepare(new, graded(rollouts), SEED)
    assert batch.old_logprob == (None,)
    for _ in accumulate(algorithm, new, batch, advantages, 0, torch.arange(6), 6):
        pass
    found = new.lm_head.weight.grad.clone()
    new.zero_grad()
    (-(replayed(new, rollouts) * advantages.double()[:, None]).sum() / (6 * L)).backward()
    torch.testing.assert_close(found, new.lm_head.weight.grad, rtol=1e-7, atol=1e-10)


def test_other_policies_are_refused(policy: MaskedDecoder) -> None:
    likelihood = built().likelihood
    likelihood.check(policy)
    with pytest.raises(
        ValueError, match=r"block_length=4, .* got one of full attention\. Use likel"
    ):
        likelihood.check(public_model("llada"))
    with pytest.raises(ValueError, match=r"block_length=4, .* got 8\. Set block_length=8"):
        likelihood.check(public_model("sdar", block_size=8))
    with pytest.raises(ValueError, match="must be block-causal"):
        likelihood.prepare(public_model("llada"), graded(rolled(policy)), SEED)
    built("slices").likelihood.check(public_model("llada"))
