"""Problems: datasets by name or place, as prompts, and which of them a training step gets."""

from .batches import Batches, batches
from .concise import concise
from .overlap import NGRAM, Overlap, overlaps
from .prompts import hint_end, load_prompts, prompt_ids
from .recipes import RECIPES, Problem, Recipe, problems, strip_calculator_annotations
from .sources import DataError, Row, Source, rows

__all__ = [
    "NGRAM",
    "RECIPES",
    "Batches",
    "DataError",
    "Overlap",
    "Problem",
    "Recipe",
    "Row",
    "Source",
    "batches",
    "concise",
    "hint_end",
    "load_prompts",
    "overlaps",
    "problems",
    "prompt_ids",
    "rows",
    "strip_calculator_annotations",
]
