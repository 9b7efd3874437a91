from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from igpo import train as program
from igpo.cli import main
from igpo.config import Config, ConfigError
from igpo.config_io import dump
from igpo.logging import RunLog
from igpo.models import MaskedDecoder
from igpo.optim import TrainingError
from igpo.rl.algorithms import build_algorithm
from igpo.train import Run, set_up, train
from igpo.types import Graded, Prompt, Rollouts, take

PROGRESS_OF_TRL = {
    "loss", "reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "grad_norm", "learning_rate",
    "num_tokens", "step_time", "clip_ratio/region_mean", "completions/mean_length", "completions/clipped_ratio",
}  # fmt: skip


def parity(rollouts: Rollouts, prompts: Sequence[Prompt]) -> Graded:
    """A reward that a model without training already differs in: the share of even tokens."""
    rewards = (rollouts.completion % 2 == 0).float().mean(1)
    correct = rewards >= 0.75
    return Graded(
        rollouts, rewards, correct, torch.zeros_like(correct), ("",) * len(rewards), {"parity": rewards}
    )  # fmt: skip


def ready(cfg: Config, grade: Callable[..., Graded] = parity) -> Run:
    run = set_up(cfg)
    pad = run.tokenizer.pad_token_id
    return replace(
        run, grade=grade, algorithm=build_algorithm(cfg.rl, cfg.rollout, grade, pad_id=pad)
    )


def finished(
    cfg: Config, grade: Callable[..., Graded] = parity
) -> tuple[Run, list[dict[str, Any]]]:
    run = ready(cfg, grade)
    with RunLog(cfg, run.state.step) as log:
        train(run, log)
    return run, logged(cfg)


def logged(cfg: Config) -> list[dict[str, Any]]:
    lines = (Path(cfg.train.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def same_weights(first: Run, second: Run) -> bool:
    pairs = zip(first.policy.parameters(), second.policy.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "step_time"} for line in lines]


def test_two_runs_are_bit_identical(tiny: Callable[..., Config], tmp_path: Path) -> None:
    first, lines = finished(tiny())
    second, again = finished(tiny(f"output_dir={tmp_path / 'again'}"))
    assert same_weights(first, second)
    assert timeless(lines) == timeless(again)
    other, _ = finished(tiny(f"output_dir={tmp_path / 'other'}", "seed=4"))
    assert not same_weights(first, other)


def test_training_raises_the_reward(tiny: Callable[..., Config]) -> None:
    _, lines = finished(
        tiny(
            "max_steps=12",
            "algorithm=grpo",
            "max_grad_norm=1",
            "learning_rate=3e-2",
            "prompts_per_step=4",
        )
    )
    reward = [line["reward"] for line in lines]
    assert sum(reward[-3:]) / 3 > sum(reward[:3]) / 3 + 0.1


def test_every_step_logs_the_metrics_of_trl_and_of_the_explorer(
    tiny: Callable[..., Config],
) -> None:
    _, lines = finished(tiny())
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        assert line.keys() >= PROGRESS_OF_TRL | {
            "rewards/parity/mean",
            "rewards/parity/std",
            "correct",
        }
        assert line.keys() >= {"inpaint/groups_all_wrong", "inpaint/replaced", "logp/ratio_mean"}
        assert line["rollout/forwards"] >= 8 * 4
    rates = [line["learning_rate"] for line in lines]
    assert rates == [1e-2, 1e-2, 1e-2, 1e-2]  # two updates a step: warm-up ends with the first step
    tokens = [line["num_tokens"] for line in lines]
    assert tokens == [tokens[0] * n for n in (1, 2, 3, 4)]


def test_the_first_update_is_on_policy(tiny: Callable[..., Config]) -> None:
    _, lines = finished(tiny("num_iterations=1", "max_steps=2"))
    for line in lines[:1]:
        assert line["logp/ratio_mean"] == 1
        assert line["clip_ratio/region_mean"] == 0
        assert line["kl"] == 0


def test_logging_steps_average_and_the_last_step_is_always_logged(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    _, every = finished(tiny())
    _, some = finished(tiny("logging_steps=3", f"output_dir={tmp_path / 'some'}"))
    assert [line["step"] for line in some] == [2, 3]
    mean = sum(line["reward"] for line in every[:3]) / 3
    assert some[0]["reward"] == pytest.approx(mean)
    assert some[1]["reward"] == every[3]["reward"]
    assert [line["num_tokens"] for line in some] == [line["num_tokens"] for line in every[2:]]


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
def test_the_gradient_does_not_depend_on_the_size_of_micro_batches(
    tiny: Callable[..., Config], loss_type: str
) -> None:
    results = []
    for size in (1, 3, 8):
        cfg = tiny(
            f"per_device_train_batch_size={size}", f"loss_type={loss_type}", "mask_after_eos=true"
        )
        run = ready(cfg)
        batch, advantages = prepared(run)
        with torch.no_grad():  # off the old policy, so that ratios and clipping matter
            for weight in run.policy.parameters():
                weight.mul_(1.5)
        loss, found = program.backward(run, batch, advantages, 1, torch.arange(8))
        gradient = torch.cat(
            [w.grad.flatten() for w in run.policy.parameters() if w.grad is not None]
        )
        results.append((loss, found, gradient))
    (loss, found, gradient), *others = results
    assert gradient.norm() > 1e-4
    for other_loss, other_found, other in others:
        assert other_loss == pytest.approx(loss, rel=1e-4, abs=1e-7)
        assert other_found == pytest.approx(found, rel=1e-4, abs=1e-6)
        torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-6)


def prepared(run: Run) -> tuple[Any, torch.Tensor]:
    """The batch and advantages of the first step."""
    seed = program.Seed(run.cfg.train.seed).at(0)
    prompts = run.batches.at(0)
    canvas = program.masked_canvases(prompts, **program._canvas_options(run))
    graded = run.grade(program.denoise(run.policy, canvas, run.cfg.rollout, seed), prompts)
    rescued = run.algorithm.explorer(run.policy, prompts, graded, seed)
    batch = run.algorithm.likelihood.prepare(run.policy, rescued, seed, run.reference)
    return batch, run.algorithm.advantage(rescued)


def broken_after(steps: int, row: int) -> Callable[..., Graded]:
    """A reward that is not a number for one row of the batch, after `steps` steps."""
    calls = [0]

    def grade(rollouts: Rollouts, prompts: Sequence[Prompt]) -> Graded:
        graded = parity(rollouts, prompts)
        calls[0] += 1
        if calls[0] > steps:
            graded.rewards[row] = float("inf")
        return graded

    return grade


def test_a_loss_that_is_not_finite_stops_before_the_update(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    cfg = tiny("algorithm=grpo", "save_steps=1")
    run = ready(cfg, broken_after(2, row=5))
    with RunLog(cfg) as log, pytest.raises(TrainingError) as stopped:
        train(run, log)
    group = run.batches.at(2)[1].row_id
    message = str(stopped.value)
    assert message.startswith("step 2, inner update 0: the loss is nan")
    # an infinite reward spoils the mean of its group: its four rows, and not those of the other group
    named = ", ".join(f"completion {g} of dataset row {group}" for g in range(4))
    assert f"Rows: {named}." in message
    good, _ = finished(tiny("algorithm=grpo", "max_steps=2", f"output_dir={tmp_path / 'good'}"))
    assert same_weights(run, good)
    assert [line["step"] for line in logged(cfg)] == [0, 1]
    assert (tmp_path / "run" / "checkpoint-2" / "state.json").is_file()
    assert not (tmp_path / "run" / "checkpoint-3").exists()


def test_weights_that_are_not_finite_stop_the_rollout_and_name_the_step(
    tiny: Callable[..., Config],
) -> None:
    cfg = tiny()
    run = ready(cfg)
    with torch.no_grad():
        run.policy.lm_head.weight.fill_(float("nan"))
    with (
        RunLog(cfg) as log,
        pytest.raises(TrainingError, match="step 0: denoise: the policy's logits"),
    ):
        train(run, log)


def test_lora_trains_adapters_and_leaves_the_base(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    base = set_up(tiny())
    base.policy.save_pretrained(tmp_path / "base")
    cfg = tiny(
        f"model_name_or_path={tmp_path / 'base'}",
        "use_lora=true",
        "lora_r=2",
        "max_steps=2",
        "num_iterations=1",
    )
    run, lines = finished(cfg)
    moved = dict(run.policy.named_parameters())
    assert any("lora_B" in name and p.any() for name, p in moved.items())
    weights = {
        name.replace(".base_layer", ""): p for name, p in moved.items() if "lora" not in name
    }
    for name, p in base.policy.named_parameters():
        assert torch.equal(weights[f"base_model.model.{name}"], p)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) != lines[1]["kl"]
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_bfloat16_trains_with_float32_masters(tiny: Callable[..., Config]) -> None:
    run, lines = finished(tiny("dtype=bfloat16", "max_steps=2"))
    assert run.policy.dtype == torch.bfloat16
    assert all(master.dtype == torch.float32 for master in run.updater.masters)
    assert all(
        torch.equal(w, m.bfloat16())
        for w, m in zip(run.updater.weights, run.updater.masters, strict=True)
    )
    assert all(line["grad_norm"] > 0 for line in lines)


def test_evaluation_is_logged_with_its_step(tiny: Callable[..., Config]) -> None:
    cfg = tiny(
        "max_steps=3", "eval_steps=2", f"eval_file={tiny().data.train_file}", "logging_steps=3"
    )
    run = replace(ready(cfg), evaluate=lambda: {"accuracy": 0.25})
    with RunLog(cfg) as log:
        train(run, log)
    assert [(line["step"], line.get("eval_accuracy")) for line in logged(cfg)] == [
        (1, 0.25),
        (2, None),
    ]


def test_completions_are_shown_when_asked_for(
    tiny: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tiny("max_steps=1", "log_completions=true"))
    shown = capsys.readouterr().err
    assert "completion" in shown
    assert "advantage" in shown


def test_the_command_trains_from_files_alone(tiny: Callable[..., Config], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        dump(tiny("max_steps=2", f"eval_file={tiny().data.train_file}", "eval_steps=1"))
    )
    assert main(["train", str(file), "report_to=tensorboard"]) == 0
    folder = tmp_path / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert all(any(key.startswith("eval_") for key in line) for line in lines)
    assert (folder / "checkpoint-2" / "model.safetensors").is_file()
    assert (
        json.loads((folder / "run.json").read_text())["starts"][0]["config"]["train.max_steps"] == 2
    )
    assert main(["train", str(file)]) == 2  # the folder holds a run


def test_options_of_the_algorithm_are_refused_before_anything_runs(
    tiny: Callable[..., Config],
) -> None:
    with pytest.raises(ValueError, match="algorithm: algorithm must be one of"):
        set_up(tiny("algorithm=ppo"))
    with pytest.raises(ConfigError, match="train_file must name a file that exists"):
        set_up(tiny("train_file=nowhere.jsonl"))


def test_take_keeps_the_rows_apart(tiny: Callable[..., Config]) -> None:
    run = ready(tiny())
    batch, _ = prepared(run)
    whole = run.algorithm.likelihood(run.policy, batch, 0)
    part = run.algorithm.likelihood(run.policy, take(batch, torch.tensor([5, 2])), 0)
    torch.testing.assert_close(part, whole[[5, 2]])


def test_no_reference_without_a_kl_term(tiny: Callable[..., Config]) -> None:
    assert set_up(tiny("beta=0")).reference is None
    assert set_up(tiny("beta=0.1")).reference is not None


@pytest.mark.parametrize("likelihood", ["mean_field", "elbo"])
def test_packing_changes_rounding_alone(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, likelihood: str
) -> None:
    """Prompts of 1 to 7 tokens; the policy and the reference are scored in rows of documents, rollouts are not."""
    rows = tmp_path / "rows.jsonl"
    questions = [" ".join("123456789"[: 1 + i % 7]) for i in range(10)]
    rows.write_text("".join(f'{{"question": "{q}", "answer": "#### 1"}}\n' for q in questions))
    cfg = tiny(
        f"train_file={rows}",
        "algorithm=grpo",
        f"likelihood={likelihood}",
        "max_steps=1",
        "beta=0.1",
        "adam_epsilon=1e-3",  # a gradient of rounding size makes no step
    )
    packed, calls = [], MaskedDecoder.hidden

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        packed.append("document_ids" in options)
        return calls(self, *args, **options)

    monkeypatch.setattr(MaskedDecoder, "hidden", watched)
    plain, _ = finished(cfg)
    assert not any(packed)
    packed.clear()
    other, _ = finished(
        replace(cfg, train=replace(cfg.train, packing=True, output_dir=str(tmp_path / "packed")))
    )
    assert 0 < sum(packed) < len(packed)
    pairs = zip(plain.policy.parameters(), other.policy.parameters(), strict=True)
    assert not same_weights(
        plain, set_up(replace(cfg, train=replace(cfg.train, output_dir="none")))
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
