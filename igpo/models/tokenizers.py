"""Tokenizers as the public families need them: without running code of a repository, every special token set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer

from .decoder_config import MaskedDecoderConfig
from .families import FAMILIES, Family, family_of
from .hub import folder_of


def load_tokenizer(path_or_id: str | Path, model: str | Path | None = None, **hub: Any) -> Any:
    """A fast tokenizer with mask_token, eos_token and pad_token wherever the model's config.json knows them.

    LLaDA's files name no mask token, Dream's and SDAR's name a class in Python that is not needed. The chat template is
    the one in the files.

    Args:
        path_or_id: the folder or hub id of the tokenizer.
        model: folder or hub id of the model it is for; None: the tokenizer's own.
        hub: as load_model.
    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a special token of the model is not in the vocabulary, or is another one in the tokenizer.
    """
    folder = folder_of(path_or_id, holds="tokenizer_config.json", **hub)
    described = _described(folder if model is None else folder_of(model, **hub))
    if described is None:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    family, values = described
    if family.tokenizer == "qwen2":
        # transformers 4 has a slow and a fast class, 5 one of both
        kind = getattr(transformers, "Qwen2TokenizerFast", None) or transformers.Qwen2Tokenizer
        tokenizer = kind.from_pretrained(folder, local_files_only=True)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for name, id_ in _special(family, values).items():
        _set(tokenizer, name, id_, str(folder))
    return tokenizer


def stop_token_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that end a completion: EOS, and what the tokenizer's chat template ends a turn with, if that is the
    turn_end of a public family. Without a chat template prompts are no turns, and it is EOS alone."""
    template = str(tokenizer.chat_template or "")
    added = tokenizer.added_tokens_encoder
    names = {family.turn_end for family in FAMILIES}
    ids = {added[name] for name in names if name in template and name in added}
    return frozenset(ids | {tokenizer.eos_token_id})


def _described(folder: Path) -> tuple[Family, dict[str, Any]] | None:
    """The family of the model in a folder; None for one of ours, and for a folder without a model."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    if values.get("model_type") == MaskedDecoderConfig.model_type:
        return None
    return family_of(values), values


def _special(family: Family, values: dict[str, Any]) -> dict[str, int]:
    arguments = family.arguments(values)
    names = ("mask_token", "eos_token", "pad_token")
    return {n: arguments[f"{n}_id"] for n in names if arguments[f"{n}_id"] is not None}


def _set(tokenizer: Any, name: str, id_: int, where: str) -> None:
    own = getattr(tokenizer, f"{name}_id")
    if own is None:
        token = tokenizer.convert_ids_to_tokens(id_) if id_ < len(tokenizer) else None
        if token is None:
            raise ValueError(
                f"tokenizer in {where!r}: {name}_id of the model is {id_}, got a vocabulary of {len(tokenizer)}. "
                "They do not belong together."
            )
        setattr(tokenizer, name, token)
    elif name == "mask_token" and own != id_:
        raise ValueError(
            f"tokenizer in {where!r}: its mask token is {own}, the model's {id_}. They do not belong together."
        )
