"""Consoles, progress of long jobs, and the log of a run: metrics.jsonl, run.json, TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0  # chosen: at most one plain progress line in this time

console = Console(stderr=True)  # messages and progress
output = Console()  # results

_shown: list[Progress] = []  # the display on the terminal; a nested job adds its line to it


@contextmanager
def progress(total: int, description: str) -> Iterator[Callable[..., None]]:
    """Shows how far a job of `total` units is, with the time left; yields `advance(n=1, **values)`.

    A bar on a terminal; elsewhere plain lines, at most one in ten seconds and one at the end. `values` are numbers
    shown beside it. Jobs may be nested.

        with progress(len(prompts), "eval") as advance:
            for batch in batches:
                advance(len(batch), accuracy=0.5)
    """
    if console.is_terminal:
        with _bar() as bar:
            task = bar.add_task(description, total=total, values="")

            def advance(n: int = 1, **values: float) -> None:
                bar.update(task, advance=n, values=_values(values))

            try:
                yield advance
            finally:
                bar.remove_task(task)
    else:
        lines = _Lines(total, description)
        yield lines.advance
        lines.close()


@contextmanager
def _bar() -> Iterator[Progress]:
    if _shown:
        yield _shown[-1]
        return
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"), console=console, transient=True,
    )  # fmt: skip
    with bar:
        _shown.append(bar)
        try:
            yield bar
        finally:
            _shown.pop()


class _Lines:
    """Progress as plain lines, for files and pipes."""

    def __init__(self, total: int, description: str) -> None:
        self.total, self.description, self.done, self.values = total, description, 0, {}
        self.began = self.printed = time.monotonic()

    def advance(self, n: int = 1, **values: float) -> None:
        self.done += n
        self.values = values
        if time.monotonic() - self.printed >= PLAIN_SECONDS and self.done < self.total:
            spent = time.monotonic() - self.began
            self._line(f"eta {duration(spent / max(self.done, 1) * (self.total - self.done))}")

    def close(self) -> None:
        self._line(f"took {duration(time.monotonic() - self.began)}")

    def _line(self, when: str) -> None:
        self.printed = time.monotonic()
        values = _values(self.values)
        text = f"{self.description} {self.done}/{self.total}, {when}"
        say(f"{text}, {values}" if values else text)


def say(text: str) -> None:
    """One message, as it is: no markup, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """1.4 s, 2 min 05 s, 3 h 07 min.

    >>> duration(125)
    '2 min 05 s'
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def _values(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
