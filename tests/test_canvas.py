from __future__ import annotations

import pytest
import torch

from igpo.canvas import masked_canvases, with_hints
from igpo.types import Canvas, Prompt

MASK, PAD, EOS = 9, 8, 7


def prompts() -> list[Prompt]:
    return [
        Prompt("long", (1, 2, 3), row_id=40),
        Prompt("short", (4,), row_id=2),
        Prompt("middle", (5, PAD), row_id=0),  # pad_id inside a prompt is a real token
    ]


def canvas(**changes) -> Canvas:
    arguments = {
        "num_generations": 2, "completion_length": 4, "mask_id": MASK, "pad_id": PAD, "eos_id": EOS,
    }  # fmt: skip
    return masked_canvases(prompts(), **(arguments | changes))


def test_prompts_are_padded_on_the_left_and_completions_masked() -> None:
    c = canvas()
    assert c.prompt_length == 3
    assert c.tokens[::2].tolist() == [
        [1, 2, 3, *[MASK] * 4],
        [PAD, PAD, 4, *[MASK] * 4],
        [PAD, 5, PAD, *[MASK] * 4],
    ]
    assert c.attention_mask[::2, :3].int().tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert c.attention_mask[:, 3:].all()
    assert c.position_ids[::2].tolist() == [
        [0, 1, 2, 3, 4, 5, 6],
        [0, 0, 0, 1, 2, 3, 4],
        [0, 0, 1, 2, 3, 4, 5],
    ]
    assert torch.equal(c.tokens[::2], c.tokens[1::2])
    assert (c.completion == MASK).all()
    assert not c.frozen.any()
    assert (c.mask_id, c.eos_id) == (MASK, EOS)


def test_rows_are_prompt_major_and_know_who_they_are() -> None:
    c = canvas(num_generations=3)
    assert c.group_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert c.row_ids.tolist() == [row * 2**20 + g for row in (40, 2, 0) for g in range(3)]
    for field in (c.tokens, c.position_ids, c.row_ids, c.group_ids):
        assert field.dtype == torch.int64
    assert c.attention_mask.dtype == c.frozen.dtype == torch.bool


def test_row_ids_do_not_depend_on_the_batch() -> None:
    alone = masked_canvases(
        prompts()[1:2], num_generations=2, completion_length=4, mask_id=MASK, pad_id=PAD
    )
    assert torch.equal(alone.row_ids, canvas().row_ids[2:4])
    largest = masked_canvases(
        [Prompt("", (1,), row_id=2**43 - 1)], num_generations=1, completion_length=1, mask_id=MASK, pad_id=PAD
    )  # fmt: skip
    assert largest.row_ids.tolist() == [(2**43 - 1) * 2**20]


def test_hints_are_written_and_frozen() -> None:
    before = canvas()
    hints = torch.randint(0, 7, (6, 4))
    hint_mask = torch.rand(6, 4) < 0.5
    hints[~hint_mask] = MASK  # never read
    tokens = before.tokens.clone()
    after = with_hints(before, hints, hint_mask)
    assert torch.equal(after.completion[hint_mask], hints[hint_mask])
    assert (after.completion[~hint_mask] == MASK).all()
    assert torch.equal(after.frozen, hint_mask)
    assert torch.equal(after.tokens[:, :3], before.tokens[:, :3])
    assert torch.equal(before.tokens, tokens)
    assert torch.equal(after.row_ids, before.row_ids)
    nothing = torch.zeros_like(hint_mask)
    assert torch.equal(with_hints(after, hints, nothing).frozen, hint_mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_generations": 0},
            r"masked_canvases: num_generations must be in \[1, 2\^20\], got 0",
        ),
        ({"completion_length": 0}, "completion_length must be positive, got 0"),
        ({"pad_id": MASK}, "pad_id must differ from mask_id, got 9 for both"),
        ({"eos_id": MASK}, "eos_id must differ from mask_id, got 9 for both"),
        ({"mask_id": 4}, r"prompts\[1\] must not hold mask_id=4, got it at position 0"),
    ],
)
def test_rejects_bad_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        canvas(**change)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "prompts must hold at least one prompt, got none"),
        ([Prompt("", (), row_id=0)], r"prompts\[0\] must not be empty"),
        ([Prompt("", (1,), row_id=-1)], r"prompts\[0\]\.row_id must be in \[0, 2\^43\), got -1"),
        ([Prompt("", (1,), row_id=2**43)], r"row_id must be in \[0, 2\^43\)"),
    ],
)
def test_rejects_bad_prompts(bad: list[Prompt], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_canvases(bad, num_generations=1, completion_length=1, mask_id=MASK, pad_id=PAD)


def test_rejects_bad_hints() -> None:
    c = canvas()
    everywhere = torch.ones(6, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="with_hints: hints must not be mask_id=9"):
        with_hints(c, torch.full((6, 4), MASK), everywhere)
    with pytest.raises(ValueError, match=r"hints must have shape \(6, 4\), got shape \(6, 3\)"):
        with_hints(c, torch.zeros(6, 3, dtype=torch.int64), everywhere)
