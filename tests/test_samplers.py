"""The published commit rules, each against a loop written from its definition, and by frequency where it draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from public_configs import MASK as SDAR_MASK
from public_configs import PAD as SDAR_PAD
from public_configs import public_model
from torch import Tensor
from toys import MASK, VOCAB, Scripted, before_step, canvases, hinted, rolled_alike, small_decoder

from igpo.canvas import masked_canvases
from igpo.config import RolloutConfig
from igpo.models import MaskedDecoder
from igpo.ops import unmask_step
from igpo.rollout import denoise
from igpo.rollout.schedule import SCHEDULES, pseudo_order
from igpo.types import GIVEN, Canvas, Prompt, Seed, take

CFG = RolloutConfig(
    max_completion_length=16, block_length=8, diffusion_steps=8, temperature=0.8, early_stop=False
)
SINGLE = replace(CFG, diffusion_steps=16)  # at least one position a step
CASES = {
    "maskgit_plus": replace(CFG, remasking="maskgit_plus"),
    "topk_margin": replace(CFG, remasking="topk_margin", unmask_schedule="dream"),
    "entropy": replace(CFG, remasking="entropy"),
    "greedy": replace(CFG, remasking="entropy", unmask_schedule="dream", temperature=0.0),
    "threshold": replace(SINGLE, threshold=0.2),
    "threshold of two a step": replace(CFG, threshold=0.15),
    "factor": replace(SINGLE, factor=2.2),
    "entropy_bound": replace(SINGLE, entropy_bound=2.4),
    "entropy_bound, margin": replace(SINGLE, entropy_bound=2.4, remasking="topk_margin"),
}
EVERY = {
    **CASES,
    "origin": replace(CFG, remasking="origin"),
    "alg_temp": replace(CFG, remasking="maskgit_plus", alg_temp=0.5),
}


@pytest.fixture(scope="module")
def decoder() -> MaskedDecoder:
    return small_decoder()


def scores(logits: Tensor, tokens: Tensor, cfg: RolloutConfig) -> tuple[list[float], list[float]]:
    """(confidence, entropy) of each masked position by the definitions; logits (c, V) of allowed tokens."""
    scale = cfg.temperature or 1.0
    q = (logits.double() / scale).softmax(-1)
    p = logits.double().softmax(-1) if cfg.remasking == "low_confidence" else q
    best = p.topk(2).values
    found = {
        "low_confidence": p.gather(1, tokens[:, None])[:, 0],
        "maskgit_plus": p.gather(1, tokens[:, None])[:, 0],
        "topk_margin": best[:, 0] - best[:, 1],
        "entropy": (p * (p + 1e-30).log()).sum(-1),
    }[cfg.remasking]
    return found.tolist(), (-(q * (q + 1e-30).log()).sum(-1)).tolist()


def number(confidence: list[float], entropy: list[float], cfg: RolloutConfig) -> int:
    """How many of the most confident positions (lists in that order) a parallel rule takes."""
    k = 0
    for n in range(1, len(confidence) + 1):
        taken = entropy[:n]
        good = [
            cfg.threshold is not None and confidence[n - 1] >= cfg.threshold,
            cfg.factor is not None and (n + 1) * (1 - confidence[n - 1]) <= cfg.factor,
            cfg.entropy_bound is not None and sum(taken) - max(taken) <= cfg.entropy_bound,
        ]
        if not any(good):
            break
        k = n
    return k


def one_row(
    policy: MaskedDecoder, canvas: Canvas, cfg: RolloutConfig, row: int
) -> tuple[Tensor, Tensor]:
    """A sampler from its definition, for one sequence: (completion, step of each position)."""
    one, s = take(canvas, torch.tensor([row])), canvas.prompt_length
    tokens, steps = one.tokens[0].clone(), torch.full((16,), GIVEN)
    per_block = cfg.diffusion_steps * cfg.block_length // 16
    banned = torch.tensor([MASK])
    for block in range(16 // cfg.block_length):
        inside = torch.arange(block * cfg.block_length, (block + 1) * cfg.block_length)
        counts = SCHEDULES[cfg.unmask_schedule](int((tokens[s + inside] == MASK).sum()), per_block)
        for step in range(per_block):
            where = inside[tokens[s + inside] == MASK]
            logits = policy(tokens[None], one.attention_mask, one.position_ids).logits[0, s + where]
            tempered = cfg.remasking != "low_confidence" and cfg.temperature > 0
            drawn = unmask_step(
                (logits / cfg.temperature if tempered else logits)[None], tokens[None, s + where],
                mask_id=MASK, num_unmask=16, temperature=1.0 if tempered else cfg.temperature,
                suppress_tokens=banned, seed=Seed(3).named("rollout/0").value,
                step=block * per_block + step, row_ids=one.row_ids,
            ).tokens[0]  # fmt: skip
            allowed = logits.index_fill(1, banned, -torch.inf)
            confidence, entropy = scores(allowed, drawn, cfg)
            order = sorted(range(len(where)), key=lambda i: -confidence[i])
            sure = number([confidence[i] for i in order], [entropy[i] for i in order], cfg)
            for i in order[: max(sure, counts[step])]:
                tokens[s + where[i]], steps[where[i]] = drawn[i], block * per_block + step
    return tokens[s:], steps


@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition(decoder: MaskedDecoder, name: str) -> None:
    canvas = hinted(canvases())
    rollouts = denoise(decoder, canvas, CASES[name], Seed(3))
    for row in (0, 4, 8):
        with torch.no_grad():
            tokens, steps = one_row(decoder, canvas, CASES[name], row)
        assert torch.equal(rollouts.completion[row], tokens)
        assert torch.equal(rollouts.step_map[row], steps)
    if CASES[name].diffusion_steps == 16:  # the rule must have decided something
        most = max(int((rollouts.step_map == t).sum(1).max()) for t in range(16))
        assert 1 < most < 8


@pytest.mark.parametrize("name", EVERY)
def test_rows_depend_on_themselves_and_the_seed(decoder: MaskedDecoder, name: str) -> None:
    canvas, cfg = hinted(canvases()), EVERY[name]
    whole = rolled_alike(decoder, canvas, cfg)
    other = denoise(decoder, canvas, cfg, Seed(8))
    assert torch.equal(other.tokens, whole.tokens) == (cfg.temperature == 0)
    assert (whole.completion != MASK).all()
    assert torch.equal(whole.completion[canvas.frozen], canvas.completion[canvas.frozen])


@pytest.mark.parametrize("name", ["threshold", "origin", "alg_temp"])
def test_trajectory_rebuilds_every_canvas(decoder: MaskedDecoder, name: str) -> None:
    seen: dict[int, Tensor] = {}
    rollouts = denoise(decoder, hinted(canvases()), EVERY[name], Seed(3), on_step=seen.__setitem__)
    assert torch.equal(before_step(rollouts, 0), rollouts.canvas.tokens)
    for step, tokens in seen.items():
        assert torch.equal(before_step(rollouts, step + 1), tokens)


def test_complete_rows_cost_nothing() -> None:
    """Logits so sure that every block is one step: a forward per row and block."""
    script = torch.zeros(4, 16, VOCAB)
    script[..., 3] = 30.0
    cfg = replace(SINGLE, threshold=0.9)
    rollouts = denoise(Scripted(script), canvases(ends=(1, 2, 3)), cfg, Seed(0))
    assert rollouts.num_forwards == 9 * 2
    assert set(rollouts.step_map.flatten().tolist()) == {0, 8}


def test_dream_schedule_is_its_floors() -> None:
    for masked in range(20):
        for steps in range(1, 10):
            schedule = SCHEDULES["dream"](masked, steps)
            assert sum(schedule) == masked
            grid, left = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64), masked
            for step in range(steps - 1):
                exact = float(left * (1 - grid[step + 1] / grid[step]))
                assert exact - 1 - 1e-9 < schedule[step] <= exact + 1e-9
                left -= schedule[step]
    order = pseudo_order(16, replace(CFG, unmask_schedule="dream", diffusion_steps=6))
    assert torch.equal(order.bincount(minlength=6)[:3], torch.tensor(SCHEDULES["dream"](8, 3)))


def many(logits: Tensor, cfg: RolloutConfig, seed: int = 2, rows: int = 4000) -> Tensor:
    """step_map of `rows` completions whose positions have these logits (L, V)."""
    canvas = masked_canvases(
        [Prompt("", (0,), row_id=4)], num_generations=rows, completion_length=len(logits), mask_id=7, pad_id=6
    )  # fmt: skip
    cfg = replace(cfg, max_completion_length=len(logits), block_length=len(logits))
    cfg = replace(cfg, rollout_batch_size=rows)
    return denoise(Scripted(logits[None]), canvas, cfg, Seed(seed)).step_map


def chi_square(counts: Tensor, p: Tensor) -> float:
    expected = counts.sum() * p
    return float(((counts - expected) ** 2 / expected).sum())


def test_origin_commits_each_position_on_its_own() -> None:
    steps = many(torch.randn(3, 5), replace(CFG, remasking="origin", diffusion_steps=3))
    grid = torch.linspace(1, 1e-3, 4, dtype=torch.float64)
    go = 1 - grid[1:] / grid[:-1]
    p = torch.stack((go[0], (1 - go[0]) * go[1], (1 - go[0]) * (1 - go[1])))
    joint = (p[:, None] * p).flatten()
    counts = torch.bincount(steps[:, 0] * 3 + steps[:, 2], minlength=9).double()
    assert chi_square(counts, joint) < 29  # 8 degrees of freedom: p about 3e-4


def test_alg_temp_draws_positions_by_their_scores() -> None:
    """Greedy tokens, so that scores are fixed: the first two of four positions, without replacement."""
    logits = torch.randn(4, 5) * torch.tensor([0.3, 1.0, 2.0, 3.0])[:, None]
    cfg = replace(CFG, remasking="maskgit_plus", alg_temp=0.4, diffusion_steps=4, temperature=0.0)
    steps = many(logits, cfg)
    confidence = logits.double().softmax(-1).amax(-1)
    p = (confidence / 0.4).softmax(-1)
    pairs = p[:, None] * p / (1 - p[:, None])
    pairs.fill_diagonal_(0)
    order = steps.argsort(1)
    counts = torch.bincount(order[:, 0] * 4 + order[:, 1], minlength=16).double()
    off = ~torch.eye(4, dtype=torch.bool).flatten()
    assert chi_square(counts[off], pairs.flatten()[off]) < 32  # 11 degrees of freedom: p about 8e-4


REFUSED: list[tuple[dict, str]] = [
    ({"threshold": 0.9, "factor": 1.0}, "at most one of threshold, factor may be set"),
    ({"alg_temp": 0.1, "entropy_bound": 1.0}, "at most one of entropy_bound, alg_temp"),
    ({"remasking": "random", "threshold": 0.9}, "threshold must be unset with remasking=random"),
    ({"remasking": "origin", "alg_temp": 0.9}, "alg_temp must be unset with remasking=origin"),
    ({"remasking": "entropy", "factor": 1.0}, r"factor must be unset .* Use entropy_bound"),
    ({"factor": -1.0}, r"factor must be finite and >= 0, got -1\.0"),
    ({"threshold": float("nan")}, "threshold must be finite, got nan"),
    ({"unmask_schedule": "cosine"}, r"unmask_schedule must be one of \['dream', 'even'\]"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refuses_what_contradicts(decoder: MaskedDecoder, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        denoise(decoder, canvases(), replace(CFG, **change), Seed(0))


@pytest.mark.parametrize("name", ["threshold", "entropy", "origin", "rcr", "remdm_conf"])
def test_block_causal_policies_give_the_same_with_kept_keys_and_values(name: str) -> None:
    """Prompts that end inside a block, so that the first block is of another size in every row."""
    policy = public_model("sdar").double()
    prompts = [
        Prompt("", tuple((torch.arange(n) * 13 % 90 + 10).tolist()), row_id=i)
        for i, n in enumerate((6, 8, 3, 5))
    ]
    canvas = masked_canvases(
        prompts, num_generations=2, completion_length=8, mask_id=SDAR_MASK, pad_id=SDAR_PAD
    )
    cfg = EVERY[name] if name in EVERY else replace(CFG, remasking=name)
    cfg = replace(cfg, max_completion_length=8, block_length=4, diffusion_steps=8)
    kept, plain = (
        denoise(policy, canvas, replace(cfg, use_cache=on), Seed(1)) for on in (True, False)
    )
    assert torch.equal(kept.tokens, plain.tokens)
    assert torch.equal(kept.step_map, plain.step_map)
    assert (plain.completion != SDAR_MASK).all()
    order = torch.tensor([5, 0, 7])
    some = denoise(policy, take(canvas, order), replace(cfg, rollout_batch_size=2), Seed(1))
    assert torch.equal(some.tokens, kept.tokens[order])
    assert torch.equal(some.step_map, kept.step_map[order])
