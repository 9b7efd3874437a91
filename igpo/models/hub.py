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


def folder_of(path_or_id: str | Path, *, holds: str = "config.json", **hub: Any) -> Path:
    """The folder of a path or "owner/name".

    Args:
        holds: a file that must be in it.
        hub: revision, cache_dir, token, local_files_only of huggingface_hub.snapshot_download.
    Raises:
        FileNotFoundError: neither a folder with that file nor a hub id that can be had.
    """
    folder, name = Path(path_or_id), str(path_or_id)
    if not folder.exists() and _ID.fullmatch(name):
        try:
            folder = Path(snapshot_download(name, allow_patterns=_FILES, **hub))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(
                f"{name!r} must be a folder or a hub id: there is no such folder, and the hub gave "
                f"{type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error
    if not (folder / holds).is_file():
        what = f"it has no {holds}" if folder.is_dir() else "there is no such folder"
        raise FileNotFoundError(f"path must be a folder with {holds}, got {str(folder)!r}: {what}.")
    return folder
