"""KLASS: a position is committed in parallel only when its distribution has stopped moving."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
import torch
from public_configs import MASK as SDAR_MASK
from public_configs import public_model
from test_rollout_blocks import canvases as block_canvases
from toys import MASK, canvases, hinted, small_decoder

from igpo.config import RolloutConfig
from igpo.models import MaskedDecoder
from igpo.ops import unmask_step
from igpo.rollout import denoise
from igpo.types import GIVEN, Canvas, Policy, Rollouts, Seed, take

CFG = RolloutConfig(
    max_completion_length=16, block_length=8, diffusion_steps=16, temperature=0.8, early_stop=False,
    threshold=0.15, kl_threshold=0.4,
)  # fmt: skip
CASES = {
    "published form": CFG,
    "one step": replace(CFG, kl_history=1, kl_threshold=0.15),
    "three steps": replace(CFG, kl_history=3),
    "two a step": replace(CFG, diffusion_steps=8),
    "greedy margin": replace(CFG, temperature=0.0, remasking="topk_margin", threshold=0.05),
    "guided and filtered": replace(CFG, cfg_scale=0.5, top_k=9, kl_threshold=1.0, kl_history=1),
}


@pytest.fixture(scope="module")
def decoder() -> MaskedDecoder:
    return small_decoder()


def same(a: Rollouts, b: Rollouts) -> bool:
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.step_map, b.step_map)


class Row:
    """One sequence and what is remembered of its positions, from the definition, in float64."""

    def __init__(self, policy: MaskedDecoder, canvas: Canvas, cfg: RolloutConfig) -> None:
        self.policy, self.canvas, self.cfg = policy, canvas, cfg
        self.start, self.tokens = canvas.prompt_length, canvas.tokens[0].clone()
        self.steps = [GIVEN] * 16

    def logits(self, where: list[int]) -> torch.Tensor:
        def of(tokens: torch.Tensor) -> torch.Tensor:
            found = self.policy(tokens, self.canvas.attention_mask, self.canvas.position_ids).logits
            return found[0, torch.tensor(where) + self.start].double()

        scale, logits = self.cfg.cfg_scale, of(self.tokens[None])
        if scale:
            given = (self.canvas.tokens != MASK) & self.canvas.attention_mask
            free = of(self.tokens[None].masked_fill(given, MASK))
            logits = free + (scale + 1) * (logits - free)
        logits[:, MASK] = -inf
        return logits

    def candidates(
        self, logits: torch.Tensor, where: list[int], tick: int
    ) -> tuple[torch.Tensor, ...]:
        cfg, heat = self.cfg, self.cfg.temperature
        if cfg.top_k:
            kept = logits.topk(cfg.top_k).indices
            logits = torch.full_like(logits, -inf).scatter(1, kept, logits.gather(1, kept))
        found = unmask_step(
            logits.float()[None], torch.full((1, len(where)), MASK), mask_id=MASK, num_unmask=16,
            temperature=heat, seed=Seed(3).named("rollout/0").value, step=tick, row_ids=self.canvas.row_ids,
        )  # fmt: skip
        p = logits.softmax(-1)
        best = p.topk(2).values
        margin = cfg.remasking == "topk_margin"
        score = best[:, 0] - best[:, 1] if margin else p.gather(1, found.tokens[0][:, None])[:, 0]
        return found.tokens[0], score

    def block(self, inside: range, steps: int, first: int) -> int:
        """Denoises a block; returns how many positions the bound on the divergence held back."""
        bound, least = self.cfg.kl_threshold, self.cfg.threshold
        assert bound is not None
        assert least is not None
        before: dict[int, torch.Tensor] = {}
        moved: dict[int, list[float]] = {i: [] for i in inside}
        held = 0
        todo = sum(int(self.tokens[self.start + i]) == MASK for i in inside)
        for step in range(steps):
            where = [i for i in inside if self.tokens[self.start + i] == MASK]
            if not where:
                break
            logits = self.logits(where)
            logp = logits.log_softmax(-1)
            for n, i in enumerate(where):
                if i in before:
                    terms = logp[n].exp() * (logp[n] - before[i])
                    moved[i].append(float(terms[torch.arange(len(terms)) != MASK].sum()))
                before[i] = logp[n]
            tokens, score = self.candidates(logits, where, first + step)
            count = self.cfg.kl_history
            calm = [
                len(moved[i]) >= count and all(d < bound for d in moved[i][-count:]) for i in where
            ]
            sure = [float(c) >= least for c in score]
            ready = [n for n in range(len(where)) if calm[n] and sure[n]]
            held += sum(s and not c for s, c in zip(sure, calm, strict=True))
            quota = todo // steps + (step < todo % steps)
            rest = sorted(set(range(len(where))) - set(ready), key=lambda n: -float(score[n]))
            ready += rest[: max(max(1, quota) - len(ready), 0)]
            for n in ready:
                self.tokens[self.start + where[n]] = tokens[n]
                self.steps[where[n]] = first + step
        return held


@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition(decoder: MaskedDecoder, name: str) -> None:
    cfg, canvas, held = CASES[name], hinted(canvases()), 0
    rollouts = denoise(decoder, canvas, cfg, Seed(3))
    steps = cfg.diffusion_steps // 2
    for b in (0, 4, 8):
        row = Row(decoder, take(canvas, torch.tensor([b])), cfg)
        with torch.no_grad():
            held += sum(row.block(range(8 * i, 8 * i + 8), steps, i * steps) for i in range(2))
        assert torch.equal(rollouts.completion[b], row.tokens[row.start :])
        assert rollouts.step_map[b].tolist() == row.steps
    assert held > 3
    # the bound let something through as well
    ahead = max(int((rollouts.step_map == t).sum(1).max()) for t in range(cfg.diffusion_steps))
    assert ahead > 8 // steps


@pytest.mark.parametrize("name", CASES)
def test_rows_do_not_depend_on_company(decoder: MaskedDecoder, name: str) -> None:
    canvas, cfg = hinted(canvases()), CASES[name]
    whole = denoise(decoder, canvas, cfg, Seed(4))
    order = torch.tensor([8, 1, 5])
    some = denoise(decoder, take(canvas, order), replace(cfg, rollout_batch_size=2), Seed(4))
    assert torch.equal(some.tokens, whole.tokens[order])
    assert torch.equal(some.step_map, whole.step_map[order])
    assert (whole.completion != MASK).all()


def test_without_a_bound_it_is_the_threshold_rule(decoder: MaskedDecoder) -> None:
    canvas, plain = hinted(canvases()), replace(CFG, kl_threshold=None)
    whole = denoise(decoder, canvas, plain, Seed(4))
    open_ = replace(CFG, kl_threshold=inf, kl_history=0)
    assert same(denoise(decoder, canvas, open_, Seed(4)), whole)
    assert not same(denoise(decoder, canvas, CFG, Seed(4)), whole)


def test_with_a_bound_nothing_meets_it_is_the_schedule(decoder: MaskedDecoder) -> None:
    canvas = hinted(canvases())
    for cfg in (replace(CFG, kl_threshold=1e-30), replace(CFG, kl_threshold=inf, kl_history=8)):
        one = denoise(decoder, canvas, replace(cfg, diffusion_steps=8), Seed(4))
        plain = replace(cfg, threshold=None, kl_threshold=None, diffusion_steps=8)
        assert same(one, denoise(decoder, canvas, plain, Seed(4)))


def test_in_any_number_of_pieces_and_beside_kept_keys(
    decoder: MaskedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    canvas = hinted(canvases())
    whole = denoise(decoder, canvas, CFG, Seed(4))
    monkeypatch.setattr("igpo.rollout.stability.CHUNK", 100)
    assert same(denoise(decoder, canvas, CFG, Seed(4)), whole)
    policy = public_model("sdar").double()
    cfg = replace(CFG, max_completion_length=8, block_length=4, diffusion_steps=8, threshold=0.01)
    blocks = block_canvases()
    cached = denoise(policy, blocks, cfg, Seed(5))
    assert same(cached, denoise(policy, blocks, replace(cfg, use_cache=False), Seed(5)))
    assert (cached.tokens != SDAR_MASK).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"threshold": None},
            r"kl_threshold must come with threshold.* Set threshold \(KLASS: 0.9\)",
        ),
        ({"kl_threshold": 0.0}, "kl_threshold must be positive, inf for no bound, got 0.0"),
        ({"kl_threshold": float("nan")}, "kl_threshold must be positive"),
        ({"kl_history": -1}, "kl_history must be >= 0, got -1"),
    ],
)
def test_contradictions_are_refused(decoder: Policy, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        denoise(decoder, canvases(), replace(CFG, **change), Seed(0))
