"""Rewards: texts in, numbers and verdicts out."""

from .functions import REWARDS
from .grader import Grade, RewardError, Verifier, make_grader
from .verify import extract_answer, same_answer, verify

__all__ = [
    "REWARDS",
    "Grade",
    "RewardError",
    "Verifier",
    "extract_answer",
    "make_grader",
    "same_answer",
    "verify",
]
