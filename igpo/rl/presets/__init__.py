"""Published settings, as changes to the default configuration: section -> field -> value. Every number has its source.

`igpo train preset=NAME`. A number no source gives says "ours" and why; a source is named at the top of its file. What
a preset leaves out is the default. Left out everywhere: LoRA dropout, which makes the first on-policy ratio differ
from 1.
"""

from .igpo import PRESETS as _IGPO
from .sequence import PRESETS as _SEQUENCE
from .token import PRESETS as _TOKEN

PRESETS = {**_IGPO, **_TOKEN, **_SEQUENCE}

__all__ = ["PRESETS"]
