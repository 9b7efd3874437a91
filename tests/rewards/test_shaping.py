"""Format and length rewards: bounded, by hand-computed examples."""

from __future__ import annotations

import pytest

from igpo.rewards import repetition_penalty, soft_overlong
from igpo.rewards.shaping import boxed, d1_xmlcount, igpo_format, tags

GOOD = "<reasoning>\nwhy\n</reasoning>\n<answer>\n\\boxed{4}\n</answer>"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (GOOD, 1.0),
        (GOOD.removeprefix("<reasoning>"), 1.0),  # the prompt held it
        (GOOD + "<|eot_id|><|endoftext|>", 1.0),
        (GOOD + " and more", 0.0),
        (GOOD + GOOD, 0.0),
        (GOOD.replace("</reasoning>", "</reasoning> so"), 0.0),
        ("4", 0.0),
    ],
)
def test_tags(text: str, value: float) -> None:
    assert tags(["q"], [text]) == [value]
    assert tags(["q"], [[{"role": "assistant", "content": text}]]) == [value]


def test_boxed() -> None:
    texts = [r"\boxed{4}", r"\boxed{}", r"\boxed{4", "4"]
    assert boxed([""] * 4, texts) == [1.0, 0.0, 0.0, 0.0]


def test_published_format_rewards() -> None:
    texts = [GOOD, GOOD + "\n", GOOD + "\n12345678", GOOD.removeprefix("<reasoning>\n"), "4"]
    # without "\n</answer>\n" the whole text counts as what follows it
    first = 0.5 - 0.001 * len(GOOD) + 0.001
    last = 0.375 - 0.001 * len(texts[3]) + 0.001
    assert d1_xmlcount([""] * 5, texts) == pytest.approx([first, 0.5, 0.5 - 0.016, last, 0.0])
    assert igpo_format([""] * 5, texts) == pytest.approx([0.75, 0.75, 0.75, 0.625, 0.0])


def test_soft_overlong_is_a_line_to_minus_one() -> None:
    reward = soft_overlong(10, 4)
    ids = [[0] * n for n in (0, 6, 7, 8, 10, 12)]
    assert reward([""] * 6, [""] * 6, completion_ids=ids) == [0, 0, -0.25, -0.5, -1, -1]
    with pytest.raises(ValueError, match=r"must lie in 1..10 .*, got 11"):
        soft_overlong(10, 11)


def test_repetition_counts_repeated_ngrams() -> None:
    reward = repetition_penalty(2, -1.0)
    assert reward([""] * 3, ["a b c d", "a b a b a", "a"]) == [0.0, -0.5, 0.0]
    with pytest.raises(ValueError, match="got 0 and -1"):
        repetition_penalty(0, -1.0)
