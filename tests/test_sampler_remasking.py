"""Samplers that take tokens back, against loops written from their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toys import MASK, VOCAB, Scripted, canvases, hinted, small_decoder

from igpo.config import AlgorithmConfig, RolloutConfig
from igpo.models import MaskedDecoder
from igpo.ops import _philox, _sampling, unmask_step
from igpo.rl.algorithms import build_algorithm
from igpo.rollout import denoise
from igpo.types import GIVEN, Canvas, Seed, take

CFG = RolloutConfig(
    max_completion_length=16, block_length=8, diffusion_steps=8, temperature=1.0, early_stop=False
)
NAMES = ["rcr", "remdm_conf"]


@pytest.fixture(scope="module")
def decoder() -> MaskedDecoder:
    return small_decoder()


class Row:
    """One sequence on its way: what both definitions do to it."""

    def __init__(self, policy: MaskedDecoder, canvas: Canvas, cfg: RolloutConfig) -> None:
        self.policy, self.canvas, self.cfg = policy, canvas, cfg
        self.start, self.tokens = canvas.prompt_length, canvas.tokens[0].clone()
        self.steps, self.store = [GIVEN] * 16, [0.0] * 16
        self.taken_back = 0

    def masked(self, inside: range) -> list[int]:
        return [i for i in inside if self.tokens[self.start + i] == MASK]

    def draw(self, where: list[int], tick: int, confidence: str) -> tuple[Tensor, ...]:
        """(tokens, scores, probabilities) of these positions."""
        at = torch.tensor(where) + self.start
        logits = self.policy(
            self.tokens[None], self.canvas.attention_mask, self.canvas.position_ids
        ).logits[:, at]
        found = unmask_step(
            logits, self.tokens[None, at], mask_id=MASK, num_unmask=16, temperature=self.cfg.temperature,
            suppress_tokens=[MASK], seed=Seed(3).named("rollout/0").value, step=tick,
            row_ids=self.canvas.row_ids, confidence=confidence,
        )  # fmt: skip
        p = logits[0].double().index_fill(1, torch.tensor([MASK]), -torch.inf).softmax(-1)
        return found.tokens[0], found.score[0], p.gather(1, found.tokens[0][:, None])[:, 0]

    def put(self, i: int, token: Tensor, tick: int, store: float) -> None:
        self.tokens[self.start + i], self.steps[i], self.store[i] = token, tick, store

    def take(self, i: int) -> None:
        self.tokens[self.start + i], self.steps[i] = MASK, GIVEN
        self.taken_back += 1


def rcr(row: Row, inside: range, step: int, tick: int, todo: int) -> None:
    where = row.masked(inside)
    if where:
        tokens, _, p = row.draw(where, tick, "prob")
        for n, i in enumerate(where):
            row.put(i, tokens[n], tick, float(p[n]))
    rest = sum(todo // 4 + (s < todo % 4) for s in range(step + 1, 4))
    mine = [i for i in inside if row.steps[i] != GIVEN]
    for i in sorted(mine, key=lambda i: row.store[i])[:rest]:
        row.take(i)


def remdm(row: Row, inside: range, step: int, tick: int, todo: int) -> None:
    where, earlier = row.masked(inside), [i for i in inside if row.steps[i] != GIVEN]
    t, s = 1 - step / 4, 1 - (step + 1) / 4
    if where:
        tokens, u, p = row.draw(where, tick, "random")
        for n, i in enumerate(where):
            if float(u[n]) < (t - s) / t + 1e-12:
                row.put(i, tokens[n], tick, float(p[n]))
    if not earlier:
        return
    sigma_max = min(1.0, s / (1 - t))
    weight = torch.tensor([-row.store[i] for i in earlier], dtype=torch.float64).softmax(0)
    key = _philox.key(Seed(3).named("rollout/0/positions").value, tick, _philox.STREAM_RANDOM_SCORE)
    places = torch.tensor([i - inside[0] for i in earlier])
    u = _sampling.random_score(key, places, row.canvas.row_ids.expand(len(earlier)))
    for n, i in enumerate(earlier):
        if float(u[n]) < sigma_max * float(weight[n]):
            row.take(i)


@pytest.mark.parametrize("name", NAMES)
def test_matches_the_definition(decoder: MaskedDecoder, name: str) -> None:
    cfg, canvas = replace(CFG, remasking=name), hinted(canvases())
    rollouts, taken = denoise(decoder, canvas, cfg, Seed(3)), 0
    for b in range(9):
        row = Row(decoder, take(canvas, torch.tensor([b])), cfg)
        for block in range(2):
            inside = range(8 * block, 8 * block + 8)
            todo = len(row.masked(inside))
            for step in range(4):
                with torch.no_grad():
                    {"rcr": rcr, "remdm_conf": remdm}[name](
                        row, inside, step, 4 * block + step, todo
                    )
        assert torch.equal(rollouts.completion[b], row.tokens[row.start :])
        assert rollouts.step_map[b].tolist() == row.steps
        taken += row.taken_back
    assert taken > 9


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_depend_on_company_and_hints_stay(decoder: MaskedDecoder, name: str) -> None:
    cfg, canvas = replace(CFG, remasking=name, top_k=6, record_support=True), hinted(canvases())
    whole = denoise(decoder, canvas, cfg, Seed(4))
    order = torch.tensor([8, 1, 5])
    some = denoise(decoder, take(canvas, order), replace(cfg, rollout_batch_size=2), Seed(4))
    assert torch.equal(some.tokens, whole.tokens[order])
    assert torch.equal(some.step_map, whole.step_map[order])
    assert torch.equal(whole.completion[canvas.frozen], canvas.completion[canvas.frozen])
    drawn = ~canvas.frozen
    assert (whole.step_map[drawn] >= 0).all()
    assert whole.support is not None
    assert (whole.support[drawn] == whole.completion[drawn][:, None]).any(1).all()
    assert (whole.completion != MASK).all()
    other = denoise(decoder, canvas, cfg, Seed(5))
    assert not torch.equal(other.tokens, whole.tokens)


def test_rcr_leaves_what_the_schedule_says(decoder: MaskedDecoder) -> None:
    seen: dict[int, Tensor] = {}
    cfg, canvas = replace(CFG, remasking="rcr"), hinted(canvases())
    denoise(decoder, canvas, cfg, Seed(3), on_step=seen.__setitem__)
    masked = (canvas.completion == MASK).unflatten(1, (2, 8)).sum(-1)
    for tick, tokens in seen.items():
        block, step = tick // 4, tick % 4
        m = masked[:, block]
        done = sum(m // 4 + (s < m % 4) for s in range(step + 1))
        left = (tokens[:, canvas.prompt_length :] == MASK).unflatten(1, (2, 8)).sum(-1)
        assert torch.equal(left[:, block], m - done)


def test_remdm_takes_one_token_a_step_back_at_most_on_average() -> None:
    """Equal logits: of the n earlier commits each goes with probability sigma_max / n."""
    canvas = canvases(generations=200, length=8, ends=(0,))
    seen: dict[int, Tensor] = {}
    cfg = replace(
        CFG,
        max_completion_length=8,
        diffusion_steps=4,
        remasking="remdm_conf",
        rollout_batch_size=200,
    )
    denoise(Scripted(torch.zeros(1, 8, VOCAB)), canvas, cfg, Seed(0), on_step=seen.__setitem__)
    masked = [(seen[t][:, canvas.prompt_length :] == MASK) for t in range(3)]
    for step, expected in ((1, 1.0), (2, 0.5)):
        back = (masked[step] & ~masked[step - 1]).sum(1).double()
        some = (~masked[step - 1]).any(1)
        assert abs(float(back[some].mean()) - expected) < 4 * float(back.std()) / 14


@pytest.mark.parametrize("name", NAMES)
def test_contradictions_are_refused(decoder: MaskedDecoder, name: str) -> None:
    cfg = replace(CFG, remasking=name)
    for change in ({"threshold": 0.9}, {"alg_temp": 0.3}, {"defer_tokens": (3,)}):
        with pytest.raises(ValueError, match=f"(unset|empty) with remasking={name}"):
            denoise(decoder, canvases(), replace(cfg, **change), Seed(0))
    if name == "remdm_conf":
        with pytest.raises(ValueError, match="unmask_schedule must be even with remasking=remdm"):
            denoise(decoder, canvases(), replace(cfg, unmask_schedule="dream"), Seed(0))
    with pytest.raises(ValueError, match="remasking must keep committed tokens with likelihood"):
        build_algorithm(
            AlgorithmConfig(algorithm="agrpo"), cfg, lambda rollouts, prompts: rollouts, pad_id=0
        )  # type: ignore[arg-type, return-value]
