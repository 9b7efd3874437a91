"""Configurations of the public families, one class per model_type: read from and written as they were released."""

from __future__ import annotations

import copy
from typing import Any

from .decoder_config import MaskedDecoderConfig
from .families import Family, family_of


class ReleasedConfig(MaskedDecoderConfig):
    """A MaskedDecoderConfig made of a public config.json, which it writes back, every key included.

    Only dtype and block_length (as block_size) follow the model. Make one with from_dict or from_pretrained.
    """

    model_type = "igpo_released"

    def __init__(self, released: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._released = released or {}
        super().__init__(**kwargs)

    @property
    def released(self) -> dict[str, Any]:
        return self._released

    @property
    def family(self) -> Family:
        return family_of(self._released)

    @classmethod
    def _native(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {**family_of(values).arguments(values), "released": values}

    def to_dict(self) -> dict[str, Any]:
        values = copy.deepcopy(self._released)
        if self.dtype is not None:
            key = "dtype" if "dtype" in values else "torch_dtype"
            values[key] = str(self.dtype).removeprefix("torch.")
        if self.block_length != self.family.arguments(values)["block_length"]:
            values["block_size"] = self.block_length
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


# __init__ is named in each: transformers 5 writes one of its own into a config class that does not define it
class LladaConfig(ReleasedConfig):
    model_type = "llada"
    __init__ = ReleasedConfig.__init__


class MmadaConfig(ReleasedConfig):
    model_type = "mmada"
    __init__ = ReleasedConfig.__init__


class DreamConfig(ReleasedConfig):
    model_type = "Dream"
    __init__ = ReleasedConfig.__init__


class SdarConfig(ReleasedConfig):
    model_type = "sdar"
    __init__ = ReleasedConfig.__init__


class SdarMoeConfig(ReleasedConfig):
    model_type = "sdar_moe"
    __init__ = ReleasedConfig.__init__


class Llada2MoeConfig(ReleasedConfig):
    model_type = "llada2_moe"
    __init__ = ReleasedConfig.__init__
