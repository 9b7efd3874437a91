"""Preference pairs from a file: how rows are read, what is trained on, and DPO's loss on it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from igpo.cli import main
from igpo.config import Config
from igpo.config_io import dump
from igpo.data import DataError, load_prompts
from igpo.policy import load_tokenizer
from igpo.train import collect, set_up
from igpo.types import Seed

VRPO = ("algorithm=vrpo", "num_draws=3", "num_iterations=1", "beta=0.5", "entropy_filter=1")


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def says(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def row(a: int, b: int) -> dict:
    return {
        "prompt": f"{a} + {b} =",
        "chosen": f"{a} + {b} = {a + b}",
        "rejected": f"{b} = 0",
        "source": a,
    }


def written(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def paired(tiny: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    file = written(tmp_path / "pairs.jsonl", [row(a, (3 * a + 1) % 7) for a in range(6)])
    return lambda *changes: tiny(f"train_file={file}", *VRPO, *changes)


def test_text_and_messages_are_the_same_pair(paired: Callable[..., Config], tmp_path: Path) -> None:
    cfg = paired()
    tokenizer = load_tokenizer(cfg.model)
    (plain, *_) = load_prompts(cfg.data.train_file, cfg.data, tokenizer)
    r = row(0, 1)
    forms = [
        r
        | {
            "prompt": user(r["prompt"]),
            "chosen": says(r["chosen"]),
            "rejected": says(r["rejected"]),
        },
        r | {"chosen": [*user(r["prompt"]), *says(r["chosen"])]},
        {"question": r["prompt"], **{k: r[k] for k in ("chosen", "rejected", "source")}},
    ]
    for number, prompt in enumerate(
        load_prompts(written(tmp_path / "x.jsonl", forms), cfg.data, tokenizer)
    ):
        assert (prompt.ids, prompt.pair, prompt.columns) == (
            plain.ids,
            plain.pair,
            plain.columns,
        ), number
    eos = tokenizer.eos_token_id
    assert plain.pair == tuple((*tokenizer(r[k])["input_ids"], eos) for k in ("chosen", "rejected"))
    assert (plain.trace, plain.trace_ids, plain.answer) == (None, (), None)
    assert plain.columns == {k: r[k] for k in ("chosen", "rejected", "source")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "'prompt' must be text or one message"),
        ({"prompt": [*user("1"), *says("2")]}, "'prompt' must be text or one message"),
        ({"chosen": None}, "'chosen' must be text, or messages that end in"),
        ({"rejected": user("2")}, "'rejected' must be text, or messages"),
        (
            {"chosen": [*user("7"), *says("8")]},
            "'chosen' must hold the prompt's message before its own",
        ),
        ({"chosen": row(0, 1)["rejected"]}, "'chosen' must differ from 'rejected'"),
    ],
)
def test_rows_of_another_form_are_refused(
    paired: Callable[..., Config], tmp_path: Path, change: dict, message: str
) -> None:
    cfg = paired()
    file = written(tmp_path / "y.jsonl", [row(1, 2), row(0, 1) | change])
    with pytest.raises(DataError, match=f"y.jsonl:2: column {message}"):
        load_prompts(file, cfg.data, load_tokenizer(cfg.model))
    del (r := row(0, 1))["prompt"]
    with pytest.raises(DataError, match="column 'question' must be there, got only chosen"):
        load_prompts(written(tmp_path / "z.jsonl", [r]), cfg.data, load_tokenizer(cfg.model))


def test_the_chosen_completion_then_the_rejected_one(paired: Callable[..., Config]) -> None:
    run = set_up(paired())
    prompts = run.batches.at(0)
    graded = collect(run, prompts, Seed(0))
    completion, eos = graded.rollouts.completion, run.tokenizer.eos_token_id
    for i, prompt in enumerate(prompts):
        assert prompt.pair is not None
        for j, ids in enumerate(prompt.pair):
            assert completion[2 * i + j].tolist() == [*ids, *[eos] * (8 - len(ids))]
    assert graded.rewards.tolist() == [1, 0] * 2
    assert graded.rollouts.num_forwards == 0
    assert graded.rollouts.canvas.group_ids.tolist() == [0, 0, 1, 1]
    assert graded.completions[1] == prompts[0].columns["rejected"]


@torch.no_grad()
def elbo(policy, batch) -> torch.Tensor:
    """(B,) from the equation: the mean over draws of (L/l) times the sum of log p over the l masked tokens."""
    length, total = batch.targets.shape[1], torch.zeros(())
    for draw in batch.draws[0]:
        canvas = batch.tokens.masked_fill(draw.masked, batch.canvas.mask_id)
        hidden = policy.hidden(canvas, batch.canvas.attention_mask, batch.canvas.position_ids)
        logprob = (hidden @ policy.head_weight.T)[:, -length:].log_softmax(-1)
        read = logprob.gather(-1, batch.targets[..., None])[..., 0]
        masked = draw.masked[:, -length:]
        total = total + (read * masked).sum(1) * length / masked.sum(1)
    return total / len(batch.draws[0])


def test_the_loss_is_that_of_the_equation(paired: Callable[..., Config]) -> None:
    run = set_up(paired())
    graded = collect(run, run.batches.at(0), Seed(0))
    batch = run.algorithm.likelihood.prepare(run.policy, graded, Seed(0), run.reference)
    assert run.reference is not None
    with run.reference() as frozen:
        before = elbo(frozen, batch)
    with torch.no_grad():
        for p in run.policy.parameters():
            p.mul_(1.3)
    change = elbo(run.policy, batch) - before
    margin = 0.5 * (change[::2] - change[1::2])
    value = run.algorithm.likelihood(run.policy, batch, 0)
    advantages = run.algorithm.advantage(graded)
    objective = run.algorithm.objective
    divisor = objective.divisor(batch, objective.rows(advantages), 0)
    loss, metrics = objective(value, batch, advantages, 0, divisor)
    wanted = -torch.nn.functional.logsigmoid(margin).mean()
    torch.testing.assert_close(loss.detach(), wanted, atol=1e-5, rtol=1e-4)
    assert metrics["dpo/margin"] == pytest.approx(float(margin.mean()), abs=1e-4)
    assert metrics["dpo/pairs"] == 2


def test_a_file_of_pairs_is_trained_on(paired: Callable[..., Config], tmp_path: Path) -> None:
    """From ln 2, where the policy is the reference, downwards; no rollout."""
    file = tmp_path / "config.yaml"
    file.write_text(dump(paired("max_steps=12", "save_steps=0", "learning_rate=3e-2")))
    assert main(["train", str(file)]) == 0
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [line["loss"] for line in lines]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert sum(losses[-3:]) / 3 < 0.5
    assert all(line["rollout/forwards"] == 0 for line in lines)
    assert lines[-1]["rewards/preference/mean"] == 0.5


def test_what_does_not_fit_pairs_is_refused(paired: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"preference pairs .* are for objective=preference.*Set algorithm=vrpo"
    ):
        set_up(paired("algorithm=grpo"))
    with pytest.raises(
        ValueError,
        match="dataset row 0 must have two completions of at most max_completion_length=4",
    ):
        set_up(paired("max_completion_length=4"))
    mixed = written(tmp_path / "mixed.jsonl", [{"question": "1", "answer": "1 #### 1"}, row(1, 2)])
    with pytest.raises(ValueError, match=r"dataset row 0 must have two completions.*got none"):
        set_up(paired(f"train_file={mixed}"))
