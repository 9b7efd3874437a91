"""Worked solutions without what their answer does not need; deterministic, no model."""

from __future__ import annotations

import re

from .recipes import strip_calculator_annotations

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z$\\(0-9])|\n+")
_WORD = re.compile(r"[a-z]+|[0-9][0-9,.]*")
_OPENER = re.compile(
    r"^(?:(?:okay|ok|alright|all right|well|hmm+|so|now|then|next|first(?:ly)?|second(?:ly)?|third(?:ly)?|finally|"
    r"lastly|therefore|thus|hence|also|and|but|after that|since we know that|we know that|we can see that|"
    r"(?:this|that|it) means(?: that)?|in other words|to sum up|in total)\b[,:]?\s+)+",
    re.IGNORECASE,
)
_FILLER = re.compile(
    r"^(?:let(?:'|’)?s (?:think|see|start|begin|break|work|go|double|check|verify|solve|try|find)\b|"
    r"(?:we|i) (?:need|want|have|are asked|are going|will) to (?:find|figure|determine|calculate|compute|start)\b|"
    r"(?:wait|hold on|hmm+|let me)\b|to (?:solve|answer) (?:this|the) (?:problem|question)\b|"
    r"(?:here|this) is (?:how|the solution)\b)",
    re.IGNORECASE,
)
_EQUATION = re.compile(r"[=+*/×÷]|\\(?:times|frac|cdot|div)|\d\s*-\s*\d")
_SHARED = 0.8  # of a sentence's words that are in the question make it a restatement; chosen


def concise(solution: str, question: str) -> str:
    """The solution as short lines: without calculator annotations, openers ("So,", "First,"), sentences that announce
    instead of computing, that only repeat the question, or that stood before. The last sentence stays.

    >>> concise("Let's see. There are 48 clips. So, she sold 48/2 = <<48/2=24>>24 clips.", "There are 48 clips. ...")
    'She sold 48/2 = 24 clips.'
    """
    told = set(_words(question))
    sentences = [s.strip() for s in _SENTENCE.split(strip_calculator_annotations(solution))]
    sentences = [s for s in sentences if s]
    kept: list[str] = []
    for place, sentence in enumerate(sentences):
        last = place == len(sentences) - 1
        text = _OPENER.sub("", sentence)
        text = (text[:1].upper() + text[1:]) if text != sentence else sentence
        if not last and (not text or _is_idle(text, told) or text in kept):
            continue
        kept.append(text or sentence)
    return "\n".join(" ".join(line.split()) for line in kept)


def _is_idle(sentence: str, told: set[str]) -> bool:
    """Nothing is computed here, and it is filler or says what the question said."""
    if _EQUATION.search(sentence):
        return False
    words = _words(sentence)
    new_numbers = any(word[0].isdigit() and word not in told for word in words)
    if new_numbers:
        return False
    return bool(_FILLER.match(sentence)) or sum(w in told for w in words) >= _SHARED * len(words)


def _words(text: str) -> list[str]:
    return [word.rstrip(".,") for word in _WORD.findall(text.lower())]
