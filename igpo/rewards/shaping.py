"""Rewards for form and length: bounded, and never about whether an answer is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from igpo.text import last_box, turn

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
_DEFECT = 0.001  # d1 (reward_func.py): taken off per character after the closing answer tag


def texts(completions: Sequence[Any]) -> list[str]:
    """Completions as text; TRL's conversational form ([{"role": …, "content": …}]) gives its last content."""
    return [c if isinstance(c, str) else c[-1]["content"] for c in completions]


def tags(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """1 where reasoning and answer are each in one pair of tags, in order, and nothing follows; else 0.

    The first <reasoning> may be missing: the d1 protocol puts it into the prompt.
    """
    return [float(_is_tagged(turn(text))) for text in texts(completions)]


def _is_tagged(text: str) -> bool:
    text = text.strip()
    if not text.startswith(TAGS[0]):
        text = TAGS[0] + text
    places = [text.find(tag) for tag in TAGS]
    once = all(text.count(tag) == 1 for tag in TAGS)
    between = text[places[1] + len(TAGS[1]) : places[2]].strip()
    return once and places == sorted(places) and not between and text.endswith(TAGS[3])


def boxed(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    r"""1 where the last \boxed{…} closes and is not empty, else 0."""
    return [float(bool(last_box(turn(text)))) for text in texts(completions)]


def d1_xmlcount(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """The d1 format reward (arXiv:2504.12216, released code): 0.125 for each tag that stands once on a line of its own,
    less 0.001 per character after the closing answer tag, counted twice."""
    return [_tag_count(text, 1) for text in texts(completions)]


def igpo_format(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    r"""The IGPO format reward (arXiv:2509.10396, released code): 0.125 per tag as in d1, without its deduction, and
    0.25 where there is a \boxed{."""
    return [_tag_count(text, 0) + 0.25 * ("\\boxed{" in text) for text in texts(completions)]


def _tag_count(text: str, deduct: int) -> float:
    found = 0.125 * (text.count("<reasoning>\n") == 1) + 0.125 * (
        text.count("\n</reasoning>\n") == 1
    )
    if text.count("\n<answer>\n") == 1:
        found += 0.125 - deduct * _DEFECT * len(text.rpartition("\n</answer>\n")[2])
    if text.count("\n</answer>") == 1:
        found += 0.125 - deduct * _DEFECT * (len(text.rpartition("\n</answer>")[2]) - 1)
    return found


def soft_overlong(max_completion_length: int, soft_punish_cache: int) -> Callable[..., list[float]]:
    """A reward for length, in tokens: 0 up to max_completion_length - soft_punish_cache, then a line to -1 at
    max_completion_length (DAPO, arXiv:2503.14476, equation 13; TRL's get_soft_overlong_punishment).

    The function returned needs completion_ids, which the grader passes to functions that name it.

    Raises:
        ValueError: soft_punish_cache is not in [1, max_completion_length].
    """
    if not 1 <= soft_punish_cache <= max_completion_length:
        raise ValueError(
            f"soft_overlong: soft_punish_cache must lie in 1..{max_completion_length} (max_completion_length), "
            f"got {soft_punish_cache}."
        )
    free = max_completion_length - soft_punish_cache

    def soft_overlong_reward(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float]:  # fmt: skip
        return [-min(1.0, max(0, len(ids) - free) / soft_punish_cache) for ids in completion_ids]

    return soft_overlong_reward


def repetition_penalty(ngram_size: int, max_penalty: float) -> Callable[..., list[float]]:
    """A reward against repetition: max_penalty (negative) times the fraction of word n-grams that occurred before;
    0 for texts with fewer words (TRL's get_repetition_penalty_reward).

    Raises:
        ValueError: ngram_size < 1 or max_penalty > 0.
    """
    if ngram_size < 1 or max_penalty > 0:
        raise ValueError(
            f"repetition_penalty: ngram_size must be at least 1 and max_penalty at most 0, got {ngram_size} and "
            f"{max_penalty}."
        )

    def repetition_penalty_reward(
        prompts: Sequence[Any], completions: Sequence[Any], **_: Any
    ) -> list[float]:
        return [max_penalty * _repeated(text, ngram_size) for text in texts(completions)]

    return repetition_penalty_reward


def _repeated(text: str, size: int) -> float:
    words = text.lower().split()
    total = len(words) - size + 1
    if total <= 0:
        return 0.0
    return 1 - len({tuple(words[i : i + size]) for i in range(total)}) / total
