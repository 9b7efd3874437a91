"""Rewards: texts in, numbers and verdicts out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answers import extract_answer, has_answer, same_answer
    from .functions import REWARDS, make_reward
    from .grader import Grade, RewardError, Verifier, make_grader
    from .pool import VerifierError, VerifierPool, shared_pool, verify
    from .shaping import repetition_penalty, soft_overlong
    from .verdict import ReferenceValueError, Verdict

# name -> module; loaded when asked for, as worker processes need the verifiers alone, and no torch
_PLACES = {
    "extract_answer": "answers",
    "has_answer": "answers",
    "same_answer": "answers",
    "REWARDS": "functions",
    "make_reward": "functions",
    "Grade": "grader",
    "RewardError": "grader",
    "Verifier": "grader",
    "make_grader": "grader",
    "repetition_penalty": "shaping",
    "soft_overlong": "shaping",
    "ReferenceValueError": "verdict",
    "Verdict": "verdict",
    "VerifierError": "pool",
    "VerifierPool": "pool",
    "shared_pool": "pool",
    "verify": "pool",
}

__all__ = [
    "REWARDS",
    "Grade",
    "ReferenceValueError",
    "RewardError",
    "Verdict",
    "Verifier",
    "VerifierError",
    "VerifierPool",
    "extract_answer",
    "has_answer",
    "make_grader",
    "make_reward",
    "repetition_penalty",
    "same_answer",
    "shared_pool",
    "soft_overlong",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
