"""The predictions of an evaluation on disk: one file per process, what they belong to, and all of them together.

    predictions.jsonl                        of one process; of several, all of them in order, when they are complete
    predictions-00001-of-00003.jsonl         of the second of three
    predictions….protocol.json               beside each: the identity of its completions (protocol.identity)

A process writes its own two files alone and reads the others, so that nothing is shared that two could write at once. A
completion that is in any of the files is done, by however many processes it is gone on with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Any

from .config import ConfigError
from .lines import LineFile, as_lines, replace_whole, whole_lines
from .logging import say
from .options import EvalOptions
from .protocol import differences
from .scores import Completion

Key = tuple[int, int, int]  # canvas length, row of the dataset, sample


@dataclass(frozen=True)
class Shard:
    """Problems index, index + count, index + 2 count, … of the evaluation are this process's."""

    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, options: EvalOptions, environ: Mapping[str, str] = os.environ) -> Shard:
        """By shard_index and num_shards, else as torchrun numbers its processes, else the only one."""
        index, count = options.shard_index, options.num_shards
        if index is None and count is None:
            index, count = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
        if index is None or count is None or not 0 <= index < count:
            raise ConfigError(
                f"shard_index must be in [0, num_shards), and both be given, got {index} of {count}."
            )
        return cls(index, count)

    def __str__(self) -> str:
        return f"{self.index:05d}-of-{self.count:05d}"

    def file(self, whole: Path) -> Path:
        return whole if self.count == 1 else whole.with_name(f"{whole.stem}-{self}{whole.suffix}")


class Predictions:
    """The completions that are done, and the file this process adds to.

    Raises ConfigError: files with completions of another identity, or another process writes this one.
    """

    def __init__(self, whole: Path, shard: Shard, identity: Mapping[str, Any]) -> None:
        self.whole, self.identity = whole, dict(identity)
        self.file = LineFile(shard.file(whole))
        try:
            self.done = self.read()
        except ConfigError:
            self.file.close()
            raise
        self._describe(self.file.path)

    def read(self) -> dict[Key, Completion]:
        """What all processes have finished so far."""
        found: dict[Key, Completion] = {}
        number = "[0-9]" * 5
        pattern = f"{escape(self.whole.stem)}-{number}-of-{number}{self.whole.suffix}"
        for path in (self.whole, *sorted(self.whole.parent.glob(pattern))):
            lines = whole_lines(path)[0] if path.exists() else []
            if lines:
                self._check(path)
            for line in lines:
                one = Completion(**line)
                found.setdefault((one.max_completion_length, one.row, one.sample), one)
        return found

    def add(self, completions: Iterable[Completion]) -> None:
        self.file.append(asdict(one) for one in completions)

    def merge(self, order: Sequence[Key]) -> list[Completion]:
        """All completions in order, which become the whole file. Empty while some are missing.

        The last process to finish finds all of them: it has written its own before it looks. Should two find them, both
        write the same bytes.
        """
        done = self.read()
        if not all(key in done for key in order):
            return []
        ordered = [done[key] for key in order]
        content = as_lines(map(asdict, ordered))
        if not self.whole.exists() or self.whole.read_bytes() != content:
            self._describe(self.whole)
            replace_whole(self.whole, content)
        return ordered

    def _describe(self, path: Path) -> None:
        text = json.dumps(self.identity, indent=1)
        replace_whole(path.with_suffix(".protocol.json"), text.encode())

    def _check(self, path: Path) -> None:
        side = path.with_suffix(".protocol.json")
        advice = f"Delete {self.whole.with_suffix('')}*, or choose another output_dir."
        if not side.exists():
            raise ConfigError(
                f"{path}: there is no {side.name} that says how it was made. {advice}"
            )
        found = differences(json.loads(side.read_text(encoding="utf-8")), self.identity)
        if found:
            raise ConfigError(
                f"{path}: holds completions of another protocol: {'; '.join(found)}. {advice}"
            )

    def __enter__(self) -> Predictions:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.file.close()
        if kind is KeyboardInterrupt:
            say(f"eval: stopped; the same command goes on from {self.file.path}")
