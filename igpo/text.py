"""Where an answer stands in a completion: boxes, tags, the end of the turn. All linear in the text."""

from __future__ import annotations

import re
from collections import deque

LONGEST_ANSWER = 10_000  # characters; chosen: far above every real answer
_END_OF_TURN = re.compile(r"<\|(?:eot_id|endoftext|im_end)\|>")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_OPEN, _CLOSE = "<answer>", "</answer>"


def turn(text: str) -> str:
    """The completion up to its first end-of-turn token, for texts that were decoded with special tokens.

    >>> turn("4<|eot_id|><|endoftext|>")
    '4'
    """
    found = _END_OF_TURN.search(text)
    return text[: found.start()] if found else text


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{…} or \fbox{…}, braces matched; None without one that closes.

    >>> last_box(r"so \boxed{\frac{1}{2}}, as promised")
    '\\frac{1}{2}'
    """
    box = last_match(_BOX, text)
    if box is None:
        return None
    begin, depth = box.end(), 1
    for end in range(begin, min(len(text), begin + LONGEST_ANSWER)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[begin:end].strip()
    return None


def last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = deque(pattern.finditer(text), maxlen=1)
    return found[0] if found else None


def last_answer_tag(text: str) -> str | None:
    """What the last <answer> holds, up to its </answer> or the end; None without one, or when it is empty.

    >>> last_answer_tag("<reasoning>…</reasoning><answer> 4 </answer>")
    '4'
    """
    _, tag, after = text.rpartition(_OPEN)
    inside = after.partition(_CLOSE)[0].strip() if tag else ""
    return inside if 0 < len(inside) <= LONGEST_ANSWER else None


def boxed_or_tagged(text: str) -> str | None:
    """The last box, else the last answer tag: the order of the published protocols."""
    inside = last_box(text)
    return last_answer_tag(text) if inside is None else inside
