"""Rows of a dataset: JSONL and CSV files as they are, parquet files, folders and hub datasets through `datasets`."""

from __future__ import annotations

import csv
import json
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

_SECONDS = 60  # to wait for a server; chosen
FILES = (".jsonl", ".json", ".csv", ".parquet")


class DataError(ValueError):
    """A dataset is not what the configuration says. Names source, row and column."""


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    place: a file, its URL, a folder of data files, or a hub id ("owner/name").   configs: of a hub dataset, read one
    after the other; () for its only one.   split: of a folder or hub dataset, also a slice ("train[:100]").
    """

    place: str
    configs: tuple[str, ...] = ()
    split: str = "train"

    @property
    def is_url(self) -> bool:
        return self.place.startswith(("https://", "http://"))

    @property
    def is_file(self) -> bool:
        return self.place.endswith(FILES) or Path(self.place).is_file()

    def __str__(self) -> str:
        name = ":".join((self.place, *(("+".join(self.configs),) if self.configs else ())))
        return name if self.is_file else f"{name}@{self.split}"

    @classmethod
    def parse(cls, text: str, split: str = "train") -> Source:
        """PLACE, PLACE:CONFIG, PLACE@SPLIT or PLACE:CONFIG@SPLIT; the name of a file is taken as it is.

        >>> Source.parse("openai/gsm8k:main@test[:100]")
        Source(place='openai/gsm8k', configs=('main',), split='test[:100]')
        """
        if cls(text).is_file:
            return cls(text)
        head, at, named = text.rpartition("@")
        place, colon, config = (head if at else text).partition(":")
        return cls(place, (config,) if colon else (), named if at else split)


@dataclass(frozen=True)
class Row:
    """One row: `source:number` for messages, number counted from 1 (a file's line)."""

    source: str
    number: int
    record: dict[str, Any]

    @property
    def row_id(self) -> int:
        return self.number - 1

    def value(self, *columns: str, advice: str = "") -> Any:
        """Of the first of these columns that is there. Raises DataError."""
        for column in columns:
            if column in self.record:
                return self.record[column]
        return self.fail(columns[0], "be there", f"only {', '.join(self.record)}", advice)

    def text(self, *columns: str, advice: str = "", numbers: bool = False) -> str:
        """Text that is not empty; with `numbers`, a number as text (27.0 as 27)."""
        value = self.value(*columns, advice=advice)
        if numbers and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(int(value)) if float(value).is_integer() else str(value)
        if not isinstance(value, str) or not value.strip():
            column = next(c for c in columns if c in self.record)
            self.fail(column, "be text that is not empty", short(value), advice)
        return value

    def fail(self, column: str | None, rule: str, got: str, advice: str = "") -> NoReturn:
        message = f"{self.source}:{self.number}: column {column!r} must {rule}, got {got}. {advice}"
        raise DataError(message.rstrip())


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def rows(source: Source, *, limit: int | None = None, streaming: bool = False) -> Iterator[Row]:
    """The rows of a source, the first `limit` of them.

    Raises:
        DataError: it is not there or not readable, a line is no JSON object, or `datasets` is needed and missing.
    """
    if source.place.endswith(".csv"):
        found = _csv_rows(source.place)
    elif source.is_file and not source.place.endswith(".parquet"):
        found = _json_lines(source.place)
    else:
        found = enumerate(_dataset_rows(source, streaming), 1)
    for number, record in islice(found, limit):
        yield Row(str(source), number, record)


def _json_lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of the lines that are not blank."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: must be JSON: {error.msg}, column {error.colno}."
            ) from error
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: must be a JSON object, got {short(record)}.")
        yield number, record


def _csv_rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Values stay text: a Sudoku of digits keeps its zeros."""
    reader = csv.DictReader(_text(path).splitlines())
    for record in reader:
        if None in record or None in record.values():
            raise DataError(
                f"{path}:{reader.line_num}: must have the {len(reader.fieldnames or ())} values of the header."
            )
        yield reader.line_num, record


def _text(path: str) -> str:
    try:
        if not Source(path).is_url:
            return Path(path).read_text(encoding="utf-8")
        with urllib.request.urlopen(path, timeout=_SECONDS) as answer:
            return answer.read().decode("utf-8")
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror  # of a URL, of a file
        raise DataError(f"{path}: {reason}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: must be UTF-8 text, byte {error.start} is not.") from error


def _dataset_rows(source: Source, streaming: bool) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(
            f"{source}: parquet files, folders and hub datasets need `datasets`: pip install 'igpo[data]'"
        ) from error
    for config in source.configs or (None,):
        try:
            if source.place.endswith(".parquet"):
                loaded = datasets.load_dataset(
                    "parquet", data_files=source.place, split="train", streaming=streaming
                )
            else:
                loaded = datasets.load_dataset(
                    source.place, config, split=source.split, streaming=streaming
                )
        except (OSError, ValueError) as error:  # what `datasets` raises for what is not there
            raise DataError(f"{source}: {' '.join(str(error).split())}") from error
        for record in loaded:
            yield dict(record)
