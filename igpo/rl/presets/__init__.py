"""Published settings, as changes to the default configuration: section -> field -> value. Every number has its source.

`igpo train` starts from that of its algorithm. A number no source gives says "ours" and why; a source is named at the
top of its file. What a preset leaves out is the default. Left out everywhere: LoRA dropout, which makes the first
on-policy ratio differ from 1.
"""

from .critic import PRESETS as _CRITIC
from .igpo import PRESETS as _IGPO
from .sequence import PRESETS as _SEQUENCE
from .token import PRESETS as _TOKEN

PRESETS = {**_IGPO, **_TOKEN, **_SEQUENCE, **_CRITIC}

# baselines of IGPO, without settings of their own: they are compared under its
BASELINES = ("grpo_resample", "trace_in_group", "trace_as_hints")

__all__ = ["BASELINES", "PRESETS", "preset_of"]


def preset_of(algorithm: str) -> str | None:
    """The key of PRESETS with the settings of an algorithm; None when there is none."""
    names = {preset["rl"]["algorithm"]: name for name, preset in PRESETS.items()}
    return names.get("igpo" if algorithm in BASELINES else algorithm)
