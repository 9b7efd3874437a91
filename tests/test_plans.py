"""The plan of --dry-run: passes against what the algorithms were counted to do, FLOP against torch's counter, times."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from igpo import time_plan
from igpo.cli import main
from igpo.config import Config, ConfigError, DataConfig, LoraConfig, ModelConfig, TrainConfig
from igpo.config_io import assign, pairs
from igpo.models import MaskedDecoder, MaskedDecoderConfig
from igpo.models.adapters import add_adapters
from igpo.ops._head import head_logits
from igpo.rl.presets import PRESETS
from igpo.types import Seed
from igpo.work_plan import (
    Passes,
    canvas_length,
    layers_of,
    of_rollout,
    of_sft,
    of_training,
    of_updates,
)

ROOT = Path(__file__).parent.parent
DENSE = MaskedDecoderConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, mask_token_id=1
)  # fmt: skip
SHAPES = {
    "dense": DENSE,
    "grouped": MaskedDecoderConfig(**(DENSE.to_dict() | {"num_key_value_heads": 2})),
    "experts": MaskedDecoderConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        mask_token_id=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, first_dense_layers=1,
        shared_intermediate_size=8,
    ),
}  # fmt: skip
LENGTH, ROWS = 20, 32  # of at least 16 tokens for every expert: fewer are computed as 16


def counted(model: MaskedDecoder, *, trained: bool) -> int:
    """FLOP of ROWS sequences through the layers, by torch; the head apart."""
    tokens = torch.randint(2, 31, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch.set_grad_enabled(trained),
        FlopCounterMode(display=False) as counter,
    ):
        hidden = model.hidden(tokens)
        if trained:
            hidden.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_forward_takes_the_flops_that_torch_counts(name: str) -> None:
    model = MaskedDecoder.from_seed(SHAPES[name], Seed(0))
    layers = layers_of(SHAPES[name], Config())
    planned = layers.flops(Passes(ROWS, LENGTH, LENGTH, 0))
    assert planned == counted(model, trained=False)


def test_a_backward_takes_the_flops_that_torch_counts() -> None:
    model = MaskedDecoder.from_seed(DENSE, Seed(0))
    passes = Passes(ROWS, LENGTH, LENGTH, 0, trained=True)
    assert layers_of(DENSE, Config()).flops(passes) == counted(model, trained=True)
    cfg = Config(lora=LoraConfig(True, lora_r=2, lora_target_modules=("q_proj", "up_proj")))
    policy = add_adapters(model, cfg.lora, Seed(0))
    planned = layers_of(DENSE, cfg).flops(passes)
    # below the first adapter nothing is asked for: its inputs' gradient, and that of the rest of its layer
    assert 0.9 * planned < counted(policy, trained=True) <= planned


def test_the_head_takes_the_flops_that_torch_counts() -> None:
    hidden = torch.randn(7, 16, requires_grad=True)
    weight = torch.randn(31, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        head_logits(hidden, weight)  # computed again in the backward pass
        head_logits(hidden, weight).sum().backward()
    made = layers_of(DENSE, Config())
    assert made.flops(Passes(1, 0, 0, 7, trained=True)) == counter.get_total_flops()
    frozen = layers_of(DENSE, Config(model=ModelConfig(freeze_head=True)))
    assert frozen.flops(Passes(1, 0, 0, 7, trained=True)) == counter.get_total_flops() * 3 / 4


def test_checkpointing_is_one_more_forward() -> None:
    cfg = Config(train=TrainConfig(gradient_checkpointing=True))
    passes = Passes(2, 8, 8, 0, trained=True)
    more = layers_of(DENSE, cfg).flops(passes) - layers_of(DENSE, Config()).flops(passes)
    assert more == layers_of(DENSE, cfg).flops(replace(passes, trained=False))


MEASURED = json.loads(sorted((ROOT / "benchmarks/results").glob("*-algorithm_cost.json"))[-1].read_text())  # fmt: skip


@pytest.mark.parametrize("row", MEASURED["rows"], ids=lambda row: row["name"])
def test_passes_are_those_the_algorithms_were_counted_to_make(row: dict) -> None:
    """benchmarks/algorithm_cost.py counted them on the running code, of random rollouts."""
    cfg = assign(Config(), pairs(PRESETS[row["name"]]), "test")
    found = of_updates(cfg)
    names = {
        "old": "old policy",
        "reference": "reference",
        "first pass": "first passes of the updates",
        "train": "updates",
    }
    for key, part in names.items():
        planned = sum(p.count for p in found.get(part, ())) / cfg.rl.num_iterations
        if (row["name"], key) == ("vrpo", "train"):  # only the best and the worst of a group
            assert planned >= row[key]
        else:
            assert planned == pytest.approx(row[key], rel=0.05), part


def test_a_step_of_igpo() -> None:
    cfg, sequences = Config(), 64 * 8
    parts = of_training(cfg, DENSE)
    assert parts["rollout"] == parts["rescue"] == [Passes(sequences * 128, 512, 512, 17)]
    assert [p.count for p in parts["old policy"]] == [sequences]  # one mask for all inner updates
    assert {p.read for p in parts["updates"]} == {256}
    assert sum(p.count for p in parts["updates"]) == sequences * 4
    grpo = assign(cfg, [("rl.algorithm", "grpo")], "test")
    assert of_training(grpo, DENSE)["rescue"] == []


def test_a_rollout_of_a_block_causal_model_computes_blocks() -> None:
    cfg = Config(data=DataConfig(max_prompt_length=64))
    sdar = MaskedDecoderConfig(**(DENSE.to_dict() | {"block_length": 32}))
    prompt, stored, steps = of_rollout(cfg, sdar)
    assert (prompt.tokens, stored.count, steps.count, steps.tokens) == (64, 7, 128, 32)
    assert steps.context == 64 + (256 + 32) / 2
    without = assign(cfg, [("rollout.use_cache", False)], "test")
    assert of_rollout(without, sdar) == [Passes(128, 320, 320, 17)]


def test_a_step_without_a_commit_calls_no_model() -> None:
    changes = [("rollout.unmask_schedule", "dream"), ("rollout.diffusion_steps", 256)]
    cfg = assign(Config(), changes, "test")
    (passes,) = of_rollout(cfg, DENSE)
    assert 0 < passes.count < 256


def rate(**changes) -> time_plan.Rate:
    made = time_plan.Rate("rollout", "NVIDIA H200", None, "bfloat16", "32x4096", 2.0, "2026-12-01", "abc")  # fmt: skip
    return replace(made, **changes)


def test_only_a_rate_of_this_device_type_and_number_of_threads_counts() -> None:
    device, threads = torch.device("cpu"), torch.get_num_threads()
    mine = rate(device=time_plan.device_name(device), threads=threads, dtype="float32")
    others = [rate(), replace(mine, dtype="bfloat16"), replace(mine, threads=threads + 1)]
    older = replace(mine, date="2026-01-01", tflop_per_s=1.0)
    assert time_plan.rates_here(others, device, torch.float32) == {}
    found = time_plan.rates_here([mine, older, *others], device, torch.float32)
    assert found == {"rollout": mine}


def test_times_are_flops_over_the_rate_and_absent_without_one() -> None:
    layers, cfg = layers_of(DENSE, Config()), Config()
    parts = of_training(cfg, DENSE)
    found = time_plan.lines(parts, layers, {"rollout": rate(tflop_per_s=2.0)}, None)
    by_name = {line.part: line for line in found}
    assert by_name["rollout"].seconds == pytest.approx(by_name["rollout"].flops / 2e12)
    assert by_name["updates"].seconds is None
    low, high = time_plan.totals(found)
    assert low.seconds is None
    assert high.forwards - low.forwards == by_name["rescue"].forwards
    low, high = time_plan.totals(time_plan.lines(parts, layers, {}, 3.0))
    assert low.seconds == pytest.approx(low.flops / 3e12)
    assert high.seconds == pytest.approx(high.flops / 3e12)


def test_durations_are_for_people() -> None:
    shown = [time_plan.duration(s) for s in (0.5, 119, 120, 7200, 1e6, None)]
    assert shown == ["0.5 s", "119 s", "2 min", "2 h", "11.6 days", ""]


def test_the_plan_says_what_its_times_rest_on() -> None:
    parts, place = of_training(Config(), DENSE), "some device in float32"
    (sentence,) = time_plan.source(parts, {}, None, place)
    assert sentence.startswith(
        f"no rate of rollout and train_step was measured on {place}: no times"
    )
    assert time_plan.source(parts, {}, 3.0, "here") == ["times at the 3 TFLOP/s given"]
    there, missing = time_plan.source(parts, {"rollout": rate()}, None, "here")
    assert "2 TFLOP/s, measured with a 32x4096 bfloat16 decoder on NVIDIA H200, 2026-12-01" in there
    assert missing.startswith("no rate of train_step was measured on here")


def test_the_rates_shipped_can_be_read_and_say_where_they_are_from() -> None:
    for found in time_plan.measured():
        assert found.benchmark in ("rollout", "train_step")
        assert found.tflop_per_s > 0
        assert found.date
        assert found.commit


@pytest.mark.parametrize("tflops", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_must_be_one(tflops: float) -> None:
    with pytest.raises(ConfigError, match="tflops must be positive"):
        time_plan.check_tflops(tflops)


def test_the_command_line_takes_a_rate_in_a_dry_run_alone(capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert main(["train", "tflops=3"]) == 2
    assert "unknown" in capsys.readouterr().err
    assert main(["train", "tflops=0", "--dry-run"]) == 2
    assert "tflops must be positive" in capsys.readouterr().err


def test_sft_reads_half_of_the_completion() -> None:
    """A block-causal model learns behind a clean copy: twice the tokens."""
    cfg = Config()
    length = canvas_length(cfg)
    for block_length, copies in ((None, 1), (32, 2)):
        shape = MaskedDecoderConfig(vocab_size=8, mask_token_id=0, block_length=block_length)
        (passes,) = of_sft(cfg, shape)["update"]
        assert passes == Passes(64, copies * length, length, 128, trained=True)
