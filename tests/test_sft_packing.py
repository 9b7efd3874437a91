"""SFT without padding: packed rows give the loss and gradient of the padded batch; what the canvas ends with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from public_configs import public_model
from torch import Tensor

from igpo.config import Config, ConfigError
from igpo.config_io import assign
from igpo.logging import RunLog
from igpo.models import MaskedDecoder
from igpo.policy import load_tokenizer
from igpo.sft import (
    WEIGHTINGS,
    Examples,
    Run,
    completion_length,
    fit,
    held_out_loss,
    losses,
    noisy_examples,
    set_up,
    sft_loss,
)
from igpo.types import Prompt, Seed, take

LENGTH, BLOCK = 13, 4
# prompts and traces of 1, a prime, the whole canvas; the last trace fills its block
SIZES = ((1, 1), (7, 3), (2, LENGTH), (5, 5), (3, 1), (6, 6))
EVERYTHING = torch.arange(len(SIZES))


def prompts(eos: int) -> list[Prompt]:
    return [
        Prompt("", tuple(range(6, 6 + before)), row, trace_ids=(*range(6, 5 + own), eos))
        for row, (before, own) in enumerate(SIZES)
    ]


@pytest.fixture
def cfg(tiny: Callable[..., Config]) -> Config:
    return tiny(f"max_completion_length={LENGTH}", "max_prompt_length=8", "sft_batch_size=6")


def with_options(cfg: Config, **changes: object) -> Config:
    return assign(cfg, list(changes.items()), "test")


def ready(cfg: Config, policy: Any) -> tuple[Run, Examples]:
    """A run of this policy in float64, and a batch for it."""
    run = replace(set_up(cfg), policy=policy.double())
    examples = run.noisy(prompts(run.tokenizer.eos_token_id), Seed(1))
    return run, replace(examples, weight=examples.weight.double())


def with_gradient(run: Run, examples: Examples) -> tuple[float, Tensor, int]:
    run.policy.zero_grad()
    parts = list(losses(run, examples, EVERYTHING))
    torch.stack(parts).sum().backward()
    grads = [p.grad.flatten() for p in run.policy.parameters() if p.grad is not None]
    return sum(float(x.detach()) for x in parts), torch.cat(grads), len(parts)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", ["dream", "sdar"])
def test_packed_loss_and_gradient_are_those_of_the_padded_batch(
    cfg: Config, weighting: str, name: str
) -> None:
    drop = (name == "dream") == (weighting == "L/l")
    cfg = with_options(
        cfg, sft_weighting=weighting, drop_eos_padding=drop, train_on_eos_padding=not drop
    )
    policy = public_model(name, **({"block_size": BLOCK} if name == "sdar" else {}))
    loss, gradient, _ = with_gradient(*ready(cfg, policy))
    tight = 6 if not drop else 3 if name == "dream" else 4  # rows of 20 tokens
    for capacity, rows in ((None, 1 if drop else 2), (20, tight), (10_000, 1)):
        packed = with_options(cfg, packing=True, max_packed_length=capacity)
        other, same, parts = with_gradient(*ready(packed, policy))
        assert other == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(same, gradient, rtol=0, atol=1e-12 * float(gradient.abs().max()))
        assert parts == rows


@pytest.mark.parametrize(("block", "kept"), [(None, (1, 3, 13, 5, 1, 6)), (4, (3, 5, 13, 7, 1, 6))])
def test_a_dropped_tail_is_padding(cfg: Config, block: int | None, kept: tuple[int, ...]) -> None:
    cfg = with_options(cfg, drop_eos_padding=True, train_on_eos_padding=False)
    tokenizer = load_tokenizer(cfg.model)
    rows = prompts(tokenizer.eos_token_id)
    assert tuple(completion_length(p, cfg, block) for p in rows) == kept
    shown = torch.zeros(len(rows), LENGTH, dtype=torch.int64)
    for seed in range(30):
        found = noisy_examples(rows, cfg, tokenizer, Seed(seed), block_length=block)
        real = found.canvas.attention_mask[:, found.canvas.prompt_length :]
        assert real.sum(1).tolist() == list(kept)
        assert real.long().diff(dim=1).le(0).all()  # the tail alone is missing
        hidden = found.canvas.completion == tokenizer.mask_token_id
        assert not (hidden & ~real).any()
        shown += hidden
        own = torch.arange(LENGTH) < torch.tensor([[size] for _, size in SIZES])
        assert torch.equal(found.masked, hidden & own)
    assert torch.equal(shown > 0, real)
    exact = with_options(cfg, sft_weighting="L/l")
    found = noisy_examples(rows, exact, tokenizer, Seed(3), block_length=block)
    count = (found.canvas.completion == tokenizer.mask_token_id).sum(1).double()
    sizes = torch.tensor([size for _, size in SIZES])
    expected = torch.tensor(kept) / (count * sizes * len(rows))
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-6, atol=0)


def test_the_tail_does_not_change_a_block_causal_model_s_loss(cfg: Config) -> None:
    """What follows the EOS's block is never seen by it: dropping it saves its tokens and nothing else."""
    policy: MaskedDecoder = public_model("sdar", block_size=BLOCK)
    plain = with_options(cfg, train_on_eos_padding=False)
    run, whole = ready(plain, policy)
    dropped, shorter = ready(with_options(plain, drop_eos_padding=True), policy)
    assert shorter.canvas.attention_mask.sum() < whole.canvas.attention_mask.sum()
    assert torch.equal(shorter.masked, whole.masked)
    (mine,), (theirs,) = (
        list(losses(r, e, torch.tensor([1]))) for r, e in ((dropped, shorter), (run, whole))
    )
    assert float(mine.detach()) == pytest.approx(float(theirs.detach()), rel=1e-12)


@torch.no_grad()
def test_blocks_are_learned_behind_the_clean_ones(cfg: Config) -> None:
    policy = public_model("sdar", block_size=BLOCK)
    run, examples = ready(cfg, policy)
    canvas, expected = examples.canvas, 0.0
    for b in EVERYTHING.tolist():
        some = take(examples, torch.tensor([b]))
        real = canvas.attention_mask[b]
        noisy = canvas.tokens[b][real]
        before = len(noisy) - LENGTH
        clean = torch.cat((noisy[:before], examples.targets[b]))
        for start in range(0, len(noisy), BLOCK):
            here = torch.cat((clean[:start], noisy[start : start + BLOCK]))
            logp = policy(here[None]).logits[0].log_softmax(-1)
            for k in range(max(start, before), len(here)):
                if some.masked[0, k - before]:
                    expected -= float(logp[k, clean[k]] * some.weight)
    found = [float(x) for x in losses(run, examples, EVERYTHING)]
    assert sum(found) == pytest.approx(expected, rel=1e-9)
    assert float(sft_loss(policy, examples)) != pytest.approx(expected, rel=1e-3)
    plain = replace(run, cfg=with_options(cfg, beside_clean=False))
    found = [float(x) for x in losses(plain, examples, EVERYTHING)]
    assert sum(found) == pytest.approx(float(sft_loss(policy, examples)), rel=1e-9)


def finished(cfg: Config) -> Run:
    run = set_up(cfg)
    with RunLog(cfg, run.state.step) as log:
        fit(run, log)
    return run


def weights(run: Run) -> Tensor:
    return torch.cat([p.detach().flatten() for p in run.policy.parameters()])


def test_a_packed_run_resumes_exactly_and_learns_the_same(cfg: Config, tmp_path: Path) -> None:
    rows = [
        {
            "question": " ".join("123456789"[: 1 + i % 7]),
            "answer": "1 + 2 = 3 " * (i % 3) + "#### 3",
        }
        for i in range(12)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = with_options(
        cfg, train_file=str(file), eval_file=str(file), eval_steps=4, max_steps=4, packing=True,
        drop_eos_padding=True, train_on_eos_padding=False, max_packed_length=30, adam_epsilon=1e-3,
    )  # fmt: skip
    whole = finished(with_options(cfg, output_dir=str(tmp_path / "whole")))
    halves = with_options(cfg, output_dir=str(tmp_path / "halves"))
    finished(with_options(halves, max_steps=2))
    resumed = finished(with_options(halves, resume_from_checkpoint="last"))
    assert torch.equal(weights(whole), weights(resumed))
    # packing may be switched in between: rounding alone depends on it
    mixed = with_options(cfg, output_dir=str(tmp_path / "mixed"), packing=False)
    finished(with_options(mixed, max_steps=2))
    other = finished(with_options(mixed, packing=True, resume_from_checkpoint="last"))
    torch.testing.assert_close(weights(other), weights(whole), rtol=0, atol=1e-4)
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["epoch"] == 2
    assert last["eval_loss"] == pytest.approx(held_out_loss(whole), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"packing": True, "max_packed_length": 10},
            r"max_packed_length must hold the longest sequence, 17 tokens, got 10",
        ),
        ({"packing": True, "max_packed_length": 0}, r"17 tokens, got 0\. Sequences are never cut"),
        (
            {"drop_eos_padding": True},
            r"train_on_eos_padding must be false when drop_eos_padding is true, got True",
        ),
    ],
)
def test_settings_that_contradict_are_refused(cfg: Config, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_up(with_options(cfg, **changes))


def test_adapters_train_on_packed_rows(trained: Callable[..., Config]) -> None:
    pytest.importorskip("peft")
    cfg = trained(
        "use_lora=true", "lora_r=2", "packing=true", "max_steps=2", "sft_batch_size=6",
        f"max_completion_length={LENGTH}",
    )  # fmt: skip
    before = set_up(cfg).policy.state_dict()
    after = finished(cfg).policy.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora_" in name}
