"""What an algorithm does with its critic, a second network: judge the steps of completions, and what it learns.

`Critique` is the interface; `ValueCritique` is TraceRL's value model, `Discriminator` AIRL-S's step reward,
`ThresholdCritique` DiFFPO's trained bound of the sampler.
"""

from .base import CriticNetwork, Critique, Lesson, fit
from .discriminator import Discriminator, reward_to_go
from .search import search
from .threshold import ThresholdCritique
from .value import ValueCritique, gae

__all__ = [
    "CriticNetwork",
    "Critique",
    "Discriminator",
    "Lesson",
    "ThresholdCritique",
    "ValueCritique",
    "fit",
    "gae",
    "reward_to_go",
    "search",
]
