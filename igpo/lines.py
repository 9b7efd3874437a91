"""JSON-lines files that survive a kill: appended to by one process, safe on the disk before the next record is made."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .config import ConfigError


class LineFile:
    """A file that this process alone appends to. What a kill has cut short at its end is dropped.

    Raises ConfigError when another process has it open.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.stream = path, path.open("a+b")
        try:
            fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.stream.close()
            raise ConfigError(f"{path}: another process is writing it.") from error
        self.records, size = whole_lines(path)
        self.stream.truncate(size)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        self.stream.write(as_lines(records))
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def close(self) -> None:
        self.stream.close()


def as_lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a file's whole lines, and their size in bytes; half a line at the end is not one."""
    data = path.read_bytes()
    size = data.rfind(b"\n") + 1
    return [json.loads(line) for line in data[:size].split(b"\n")[:-1]], size


def replace_whole(path: Path, content: bytes) -> None:
    """All or nothing: a reader never sees half a file, whoever else writes it at the same time."""
    part = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)
