"""The critic of a run: what it is built of, saved with, stopped by, and whether it learns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from igpo.config import Config, ConfigError
from igpo.critic import Critic, build_critic
from igpo.logging import RunLog
from igpo.models import MaskedDecoder
from igpo.optim import TrainingError
from igpo.rl.algorithms import build_algorithm
from igpo.train import Run, set_up, train
from igpo.types import Graded, Prompt, Rollouts

COMMON = ("critic_learning_rate=1e-2", "per_device_train_batch_size=16")
VALUE = ("algorithm=tracerl_value", "kl_to=old", "shrink=2", *COMMON)
AIRL = ("algorithm=airl_s", "shrink=2", "num_candidates=2", *COMMON)


def grade(rollouts: Rollouts, prompts: Sequence[Prompt]) -> Graded:
    """The share of even tokens, most of which can be seen before the last step."""
    rewards = (rollouts.completion % 2 == 0).float().mean(1)
    correct = rewards >= 0.75
    return Graded(rollouts, rewards, correct, torch.zeros_like(correct), ("",) * len(rewards))


def ready(cfg: Config) -> Run:
    run = set_up(cfg)
    algorithm = build_algorithm(cfg.rl, cfg.rollout, grade, pad_id=run.tokenizer.pad_token_id)
    return replace(run, grade=grade, algorithm=algorithm)


def go(cfg: Config) -> tuple[Run, list[dict[str, Any]]]:
    run = ready(cfg)
    with RunLog(cfg, run.state.step) as log:
        train(run, log)
    lines = (Path(cfg.train.output_dir) / "metrics.jsonl").read_text().splitlines()
    return run, [{k: v for k, v in json.loads(line).items() if k != "step_time"} for line in lines]


def critic_of(run: Run) -> Critic:
    assert run.critic is not None
    return run.critic


@pytest.mark.parametrize(
    "settings",
    [VALUE, AIRL, (*VALUE, "dtype=bfloat16", "lr_scheduler_type=linear"), (*AIRL, "use_lora=true", "lora_r=2")],
    ids=["value", "discriminator", "bfloat16", "lora"],
)  # fmt: skip
def test_an_interrupted_run_goes_on_bitwise(
    tiny: Callable[..., Config], tmp_path: Path, settings: tuple[str, ...]
) -> None:
    """2k steps at once, against k steps, a new process, k steps: both networks, both optimizers, every metric."""
    if "use_lora=true" in settings:
        set_up(tiny()).policy.save_pretrained(tmp_path / "base")
        settings = (*settings, f"model_name_or_path={tmp_path / 'base'}")
    whole, lines = go(tiny(*settings, "save_steps=2"))
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")  # as if killed after step 2
    again = ready(tiny(*settings, "save_steps=2", "resume_from_checkpoint=last"))
    fresh = [w.clone() for w in critic_of(again).network.parameters()]
    with RunLog(again.cfg, again.state.step) as log:
        train(again, log)
    found = (Path(again.cfg.train.output_dir) / "metrics.jsonl").read_text().splitlines()
    assert [{**json.loads(line), "step_time": 0} for line in found] == [
        {**line, "step_time": 0} for line in lines
    ]
    trained = list(critic_of(again).network.parameters())
    for a, b in zip(critic_of(whole).network.parameters(), trained, strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(fresh, trained, strict=True))
    for a, b in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = (critic_of(run).updater.state_dict() for run in (whole, again))
    assert ours["done"] == theirs["done"] == 8
    for index, values in ours["weights"].items():
        for name, value in values.items():
            assert torch.equal(value, theirs["weights"][index][name]), name


def test_search_costs_the_remaining_steps(tiny: Callable[..., Config]) -> None:
    forwards = []
    for n in (1, 3):
        settings = (*AIRL, f"num_candidates={n}", "max_steps=1", "save_steps=0")
        _, (line,) = go(tiny(*settings, f"output_dir={tiny().train.output_dir}-{n}"))
        forwards.append(line["rollout/forwards"])
    assert forwards[1] == forwards[0] * (1 + 2 * (1 + 0.5))


def test_a_critic_is_a_copy_with_a_scalar_head(tiny: Callable[..., Config], tmp_path: Path) -> None:
    run = set_up(tiny(*VALUE, "num_hidden_layers=2", "critic_num_layers=1"))
    network, policy = critic_of(run).network, run.policy
    assert isinstance(network.body, MaskedDecoder)
    assert len(network.body.layers) == 1
    assert len(policy.layers) == 2
    assert network.body.lm_head is None
    assert torch.equal(network.body.embed_tokens.weight, policy.embed_tokens.weight)
    assert network.body.embed_tokens.weight is not policy.embed_tokens.weight
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    assert torch.equal(network(tokens, None, None), torch.zeros(2, 5))
    message = "critic_num_layers must be at most the 1 of the model, got 3"
    with pytest.raises(ConfigError, match=message):
        set_up(tiny(*VALUE, "critic_num_layers=3"))


def test_a_critic_may_start_from_another_model(tiny: Callable[..., Config], tmp_path: Path) -> None:
    other = set_up(tiny("hidden_size=32", "seed=9")).policy
    other.save_pretrained(tmp_path / "other")
    run = set_up(tiny(*VALUE, f"critic_name_or_path={tmp_path / 'other'}"))
    body: Any = critic_of(run).network.body
    assert torch.equal(body.embed_tokens.weight, other.embed_tokens.weight)
    assert critic_of(run).network.head.shape == (32,)
    other.config.mask_token_id = 3
    other.save_pretrained(tmp_path / "wrong")
    with pytest.raises(ConfigError, match="critic_name_or_path must have the policy's vocabulary"):
        set_up(tiny(*VALUE, f"critic_name_or_path={tmp_path / 'wrong'}"))


def test_a_run_without_its_critic_is_refused(tiny: Callable[..., Config]) -> None:
    run = set_up(tiny(*VALUE))
    with pytest.raises(ValueError, match=r"critic must be given for .*Pass critic=.*build_critic"):
        replace(run, critic=None)
    plain = set_up(tiny("algorithm=grpo"))
    assert plain.critic is None
    assert build_critic(plain.cfg, plain.policy, plain.algorithm) is None


@pytest.mark.parametrize("settings", [VALUE, AIRL], ids=["value", "discriminator"])
def test_a_critic_that_is_not_finite_stops_before_its_update(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    run = ready(tiny(*settings, "num_candidates=1"))
    critic, critique = critic_of(run), run.algorithm.critique
    assert critique is not None
    plain = type(critique).loss
    bad: list[int] = []

    def broken(self: Any, values: torch.Tensor, lesson: Any) -> Any:
        loss, found = plain(self, values, lesson)
        bad[:] = bad or [int(lesson.canvas.row_ids[0])]
        return loss * (float("inf") if bad[0] in lesson.canvas.row_ids.tolist() else 1.0), found

    monkeypatch.setattr(type(critique), "loss", broken)
    before = [w.clone() for w in critic.network.parameters()]
    with RunLog(run.cfg) as log, pytest.raises(TrainingError) as stopped:
        train(run, log)
    message = str(stopped.value)
    assert message.startswith("step 0, inner update 0, critic: the loss is inf")
    problem = bad[0] >> 20
    assert f"Rows: completion 0 of dataset row {problem}" in message
    assert message.count("dataset row") == (2 if settings is AIRL else 1)
    for a, b in zip(before, critic.network.parameters(), strict=True):
        assert torch.equal(a, b)
