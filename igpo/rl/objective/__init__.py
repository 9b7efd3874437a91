"""Objectives: from log-probs and advantages to the loss."""

from .base import Divisor, Needs, Objective, all_rows, divergence, rows_with_advantage
from .clipped import LOSS_TYPES, Clipped
from .draws import Boundary, ClippedDraws, WeightedLikelihood
from .sequences import BellmanResidual, Preference, Sandwich

__all__ = [
    "LOSS_TYPES",
    "BellmanResidual",
    "Boundary",
    "Clipped",
    "ClippedDraws",
    "Divisor",
    "Needs",
    "Objective",
    "Preference",
    "Sandwich",
    "WeightedLikelihood",
    "all_rows",
    "divergence",
    "rows_with_advantage",
]
