"""Where the files of a model are: a folder, or a hub id that is downloaded once and then found in the cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

# no Python: nothing of a repository is ever run
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_ID = re.compile(r"[\w.-]+/[\w.-]+")


def folder_of(path_or_id: str | Path, **hub: Any) -> Path:
    """The folder with config.json of a path or "owner/name".

    Args:
        hub: revision, cache_dir, token, local_files_only of huggingface_hub.snapshot_download.
    Raises:
        FileNotFoundError: neither a folder with a config.json nor a hub id that can be had.
    """
    folder, name = Path(path_or_id), str(path_or_id)
    if not folder.exists() and _ID.fullmatch(name):
        try:
            folder = Path(snapshot_download(name, allow_patterns=_FILES, **hub))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(
                f"load_model: {name!r} must be a folder or a hub id: there is no such folder, and the hub gave "
                f"{type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error
    if not (folder / "config.json").is_file():
        what = "it has no config.json" if folder.is_dir() else "there is no such folder"
        raise FileNotFoundError(
            f"load_model: path must be a folder with a saved model, got {str(folder)!r}: {what}."
        )
    return folder
