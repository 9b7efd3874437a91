"""Masked SFT: the noise, the weights, the loss against its equation, and the program."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from igpo import sft as program
from igpo.cli import main
from igpo.config import Config, ConfigError
from igpo.config_io import assign, dump
from igpo.data import DataError, load_prompts
from igpo.logging import RunLog
from igpo.optim import TrainingError
from igpo.policy import build_policy, load_tokenizer
from igpo.sft import Examples, fit, noisy_examples, set_up, sft_loss
from igpo.types import Seed, take

LENGTH = 40


@pytest.fixture
def cfg(tiny: Callable[..., Config]) -> Config:
    return tiny(
        f"max_completion_length={LENGTH}",
        "block_length=8",
        "diffusion_steps=20",
        "sft_batch_size=3",
    )


def examples(cfg: Config, seed: int = 0) -> Examples:
    tokenizer = load_tokenizer(cfg.model)
    prompts = load_prompts(cfg.data.train_file, cfg.data, tokenizer)
    return noisy_examples(prompts, cfg, tokenizer, Seed(seed))


def with_options(cfg: Config, **changes: object) -> Config:
    return assign(cfg, list(changes.items()), "test")


def test_a_trace_is_padded_with_eos_that_is_learned(cfg: Config) -> None:
    tokenizer = load_tokenizer(cfg.model)
    prompts = load_prompts(cfg.data.train_file, cfg.data, tokenizer)
    found = noisy_examples(prompts, cfg, tokenizer, Seed(0))
    for row, prompt in enumerate(prompts):
        size = len(prompt.trace_ids)
        assert found.targets[row, :size].tolist() == list(prompt.trace_ids)
        assert (found.targets[row, size:] == tokenizer.eos_token_id).all()
    hidden = torch.cat([examples(cfg, seed).masked for seed in range(20)])
    assert hidden.float().mean(0).min() > 0.2  # every position, the padding too
    shown = found.canvas.completion
    assert torch.equal(shown == tokenizer.mask_token_id, found.masked)
    assert torch.equal(shown[~found.masked], found.targets[~found.masked])


def test_padding_that_is_not_learned_is_masked_like_the_rest(cfg: Config) -> None:
    tokenizer = load_tokenizer(cfg.model)
    prompts = load_prompts(cfg.data.train_file, cfg.data, tokenizer)
    all_learned = noisy_examples(prompts, cfg, tokenizer, Seed(0))
    found = noisy_examples(
        prompts, with_options(cfg, train_on_eos_padding=False), tokenizer, Seed(0)
    )
    assert torch.equal(
        found.canvas.tokens, all_learned.canvas.tokens
    )  # the canvas does not tell where to stop
    sizes = torch.tensor([len(p.trace_ids) for p in prompts])
    learned = torch.arange(LENGTH) < sizes[:, None]
    assert torch.equal(found.masked, all_learned.masked & learned)
    assert (all_learned.masked & ~learned).any()


def test_ratios_cover_the_unit_interval_and_are_uniform_each() -> None:
    drawn = torch.stack([program._mask_ratios(8, 1e-3, Seed(3).at(step)) for step in range(2000)])
    assert drawn.min() >= 1e-3
    assert drawn.max() <= 1
    strata = ((drawn - 1e-3) / (1 - 1e-3)).sort(1).values
    assert torch.allclose(strata.diff(dim=1), torch.tensor(1 / 8, dtype=torch.float64))
    for row in range(8):  # Kolmogorov-Smirnov at 1e-4
        ks = (
            (drawn[:, row].sort().values - torch.linspace(0, 1, 2000, dtype=torch.float64))
            .abs()
            .max()
        )
        assert ks < 2.23 / 2000**0.5


@pytest.mark.parametrize("weighting", program.WEIGHTINGS)
@pytest.mark.parametrize("padding", [True, False])
def test_the_loss_is_its_equation(cfg: Config, weighting: str, padding: bool) -> None:
    cfg = with_options(cfg, sft_weighting=weighting, train_on_eos_padding=padding)
    found = examples(cfg)
    policy = build_policy(cfg, load_tokenizer(cfg.model))
    canvas = found.canvas
    with torch.no_grad():
        logits = policy(canvas.tokens, canvas.attention_mask, canvas.position_ids).logits.double()
    logp = logits[:, canvas.prompt_length :].log_softmax(-1)
    cross_entropy = -logp.gather(-1, found.targets[..., None])[..., 0]
    eos = load_tokenizer(cfg.model).eos_token_id
    sizes = torch.full((len(logp),), LENGTH) if padding else (found.targets != eos).sum(1) + 1
    t = program._mask_ratios(len(sizes), cfg.sft.sft_epsilon, Seed(0))
    masked = canvas.completion == canvas.mask_id
    assert torch.equal(found.masked, masked & (torch.arange(LENGTH) < sizes[:, None]))
    count = masked.sum(1)
    per_row = (cross_entropy * found.masked).sum(1)
    expected = {
        "1/t": (per_row / t / sizes).mean(),
        "L/l": (per_row * (LENGTH / count) / sizes).mean(),
        "none": per_row.sum() / found.masked.sum(),
    }[weighting]
    if weighting == "L/l":
        assert torch.equal(count, (t * LENGTH).round().clamp(min=1).long())
    assert sft_loss(policy, found).item() == pytest.approx(expected.item(), rel=1e-5)


def test_losses_and_gradients_of_parts_add_up(cfg: Config) -> None:
    policy = build_policy(cfg, load_tokenizer(cfg.model))
    found, gradients, losses = examples(cfg), [], []
    for size in (1, 2, 3):
        policy.zero_grad()
        parts = [take(found, rows) for rows in torch.arange(3).split(size)]
        total = [sft_loss(policy, part) for part in parts]
        sum(total).backward()  # type: ignore[union-attr]
        losses.append(sum(loss.item() for loss in total))
        gradients.append(
            torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        )
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


def finished(cfg: Config) -> tuple[program.Run, list[dict]]:
    ready = set_up(cfg)
    with RunLog(cfg, ready.state.step) as log:
        fit(ready, log)
    lines = (Path(cfg.train.output_dir) / "metrics.jsonl").read_text().splitlines()
    return ready, [json.loads(line) for line in lines]


def test_it_learns_its_examples(cfg: Config) -> None:
    _, lines = finished(
        with_options(cfg, max_steps=60, learning_rate=1e-2, max_grad_norm=1.0, sft_weighting="none")
    )
    losses = [line["loss"] for line in lines]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(cfg: Config, tmp_path: Path) -> None:
    whole, _ = finished(with_options(cfg, max_steps=4, output_dir=str(tmp_path / "whole")))
    halves = with_options(cfg, output_dir=str(tmp_path / "halves"))
    finished(with_options(halves, max_steps=2))
    resumed, lines = finished(with_options(halves, max_steps=4, resume_from_checkpoint="last"))
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    pairs = zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_loss_that_is_not_finite_stops_before_the_update(cfg: Config) -> None:
    ready = set_up(cfg)
    with torch.no_grad():
        ready.policy.lm_head.weight[5] = torch.nan
    before = [p.clone() for p in ready.policy.parameters()]
    with (
        RunLog(cfg) as log,
        pytest.raises(TrainingError, match=r"step 0: the loss is nan .*Rows: \d+, \d+"),
    ):
        fit(ready, log)
    for old, new in zip(before, ready.policy.parameters(), strict=True):
        assert torch.equal(old.nan_to_num(7), new.nan_to_num(7))


def test_the_program_evaluates_and_leaves_a_model_for_rl(cfg: Config, tmp_path: Path) -> None:
    cfg = with_options(cfg, max_steps=3, eval_steps=2, eval_file=cfg.data.train_file)
    config = tmp_path / "sft.yaml"
    config.write_text(dump(cfg), encoding="utf-8")
    assert main(["sft", str(config)]) == 0
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["eval_loss" in line for line in lines] == [False, True, False]
    folder = tmp_path / "run" / "checkpoint-3"
    again = replace(cfg.model, model_name_or_path=str(folder), tokenizer_name_or_path=None)
    tokenizer = load_tokenizer(again)
    assert build_policy(replace(cfg, model=again), tokenizer).config.vocab_size == len(tokenizer)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"sft_weighting": "t"},
            ConfigError,
            r"sft_weighting must be one of 1/t, L/l, none, got 't'",
        ),
        ({"sft_epsilon": 0.0}, ConfigError, r"sft_epsilon must lie in \(0, 1\), got 0.0"),
        (
            {"max_completion_length": 4},
            DataError,
            r"dataset row \d must have 1 to max_completion_length=4 tokens",
        ),
        ({"trace_column": "none"}, DataError, r"dataset row 0 must have .* got no trace"),
    ],
)
def test_bad_settings_are_refused(cfg: Config, changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        set_up(with_options(cfg, **changes))
