"""Objectives: from log-probs and advantages to the loss."""

from .base import Divisor, Needs, Objective, all_rows, divergence, rows_with_advantage
from .clipped import LOSS_TYPES, Clipped

__all__ = [
    "LOSS_TYPES",
    "Clipped",
    "Divisor",
    "Needs",
    "Objective",
    "all_rows",
    "divergence",
    "rows_with_advantage",
]
