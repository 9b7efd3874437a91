"""Consoles, progress of long jobs, and the log of a run: metrics.jsonl, run.json, TensorBoard."""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from . import config_io, environment
from .config import Config, ConfigError, TrainConfig
from .ranks import ranks
from .types import Graded, Metrics, Prompt

PLAIN_SECONDS = 10.0  # chosen: at most one plain progress line in this time

console = Console(stderr=True)  # messages and progress
output = Console()  # results

_shown: list[Progress] = []  # the display on the terminal; a nested job adds its line to it
_below: list[Callable[[], RenderableType]] = []  # views under the bars


@contextmanager
def progress(total: int, description: str) -> Iterator[Callable[..., None]]:
    """Shows how far a job of `total` units is, with the time left; yields `advance(n=1, **values)`.

    A bar on a terminal; elsewhere plain lines, at most one in ten seconds; at the end one line on either. `values` are
    numbers shown beside it. Jobs may be nested.

        with progress(len(prompts), "eval") as advance:
            for batch in batches:
                advance(len(batch), accuracy=0.5)
    """
    lines = _Lines(total, description)
    if console.is_terminal:
        with _bar() as bar:
            task = bar.add_task(description, total=total, values="")

            def advance(n: int = 1, **values: float) -> None:
                lines.count(n, values)
                bar.update(task, advance=n, values=_values(values))

            try:
                yield advance
            finally:
                bar.remove_task(task)
    else:
        yield lines.advance
    lines.close()


@contextmanager
def _bar() -> Iterator[Progress]:
    if _shown:
        yield _shown[-1]
        return
    bar = _Display(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"), console=console, transient=True,
    )  # fmt: skip
    with bar:
        _shown.append(bar)
        try:
            yield bar
        finally:
            _shown.pop()


class _Display(Progress):
    """Bars, and below them what `shown_below` asks for."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield from (view() for view in _below)


@contextmanager
def shown_below(view: Callable[[], RenderableType]) -> Iterator[None]:
    """While the context lasts, a terminal's progress display also shows view(), which is called at every refresh."""
    _below.append(view)
    try:
        yield
    finally:
        _below.remove(view)


class _Lines:
    """Progress as plain lines, for files and pipes."""

    def __init__(self, total: int, description: str) -> None:
        self.total, self.description, self.done, self.values = total, description, 0, {}
        self.began = self.printed = time.monotonic()

    def count(self, n: int, values: dict[str, float]) -> None:
        self.done += n
        self.values = values

    def advance(self, n: int = 1, **values: float) -> None:
        self.count(n, values)
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


class RunLog:
    """The record of a run in its folder.

    run.json: resolved configuration, versions, machine and backends of the run and of each continuation.
    config.yaml: the configuration, ready to be used again.   metrics.jsonl: one object per logged step, flushed at
    once.   Beside it the trackers of report_to.
    """

    def __init__(self, cfg: Config, first_step: int = 0) -> None:
        self.folder = Path(cfg.train.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.trackers = [
            _tracker(name, self.folder, cfg, first_step) for name in cfg.train.report_to
        ]
        self._write_facts(cfg, first_step)
        path = self.folder / "metrics.jsonl"
        kept = _lines_before(path, first_step)
        self.stream = path.open("w", encoding="utf-8")
        self.stream.writelines(kept)
        self.stream.flush()

    def _write_facts(self, cfg: Config, first_step: int) -> None:
        path = self.folder / "run.json"
        earlier = json.loads(path.read_text())["starts"] if first_step and path.exists() else []
        start = {
            "first_step": first_step,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "config": config_io.flatten(cfg),
            **environment.report(),
        }
        path.write_text(json.dumps({"starts": [*earlier, start]}, indent=1), encoding="utf-8")
        (self.folder / "config.yaml").write_text(config_io.dump(cfg), encoding="utf-8")

    def log(self, step: int, metrics: Metrics) -> None:
        """`metrics` of 0-based training step `step`; numbers that are not finite become null in the file."""
        finite = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
        line = {"step": step} | {k: finite.get(k) for k in metrics}
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()
        for tracker in self.trackers:
            tracker.log(finite, step)

    def close(self) -> None:
        self.stream.close()
        for tracker in self.trackers:
            tracker.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _NoLog(RunLog):
    """Of the processes that do not write."""

    def __init__(self) -> None:
        console.quiet = output.quiet = True

    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


def run_log(cfg: Config, first_step: int) -> RunLog:
    """The log of a run. Of several processes only the first has one; the others fall silent, on the terminal too."""
    return RunLog(cfg, first_step) if ranks().first else _NoLog()


def say_start(program: str, policy: Any, cfg: TrainConfig, first_step: int) -> None:
    """What is about to be trained, where, and into which folder."""
    weights = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    devices = f"{ranks().size} x {policy.device.type}" if ranks().size > 1 else str(policy.device)
    say(
        f"{program}: {weights / 1e6:.2f} M trained weights in {policy.dtype} on {devices}, steps {first_step} to "
        f"{cfg.max_steps}, in {cfg.output_dir}"
    )


class Tracker(Protocol):
    def log(self, metrics: Metrics, step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)

    def log(self, metrics: Metrics, step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Hosted:
    """wandb or trackio, whose modules have the same three functions."""

    def __init__(self, module: ModuleType, folder: Path, cfg: Config) -> None:
        self.module = module
        module.init(project="igpo", name=folder.name, config=config_io.flatten(cfg))

    def log(self, metrics: Metrics, step: int) -> None:
        self.module.log(dict(metrics), step=step)

    def close(self) -> None:
        self.module.finish()


def _tracker(name: str, folder: Path, cfg: Config, first_step: int) -> Tracker:
    try:
        if name == "tensorboard":
            return _TensorBoard(folder, first_step)
        return _Hosted(importlib.import_module(name), folder, cfg)
    except ImportError as error:
        raise ConfigError(
            f"report_to: {name} is not installed: pip install {name}, or report_to=none."
        ) from error


def _lines_before(path: Path, step: int) -> list[str]:
    """What an earlier part of the run wrote; later steps are run again. Half a line of a killed run is dropped."""
    if step == 0 or not path.exists():
        return []
    whole = [
        line for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")
    ]
    return [line for line in whole if json.loads(line)["step"] < step]


def completions_table(
    graded: Graded, prompts: Sequence[Prompt], advantages: Tensor, limit: int = 4
) -> Table:
    """The first `limit` completions of a step: text, parts of the reward, advantage, whether a hint made it."""
    table = Table("prompt", "completion", *graded.parts, "reward", "advantage", "rescued")
    groups = graded.rollouts.canvas.group_ids.tolist()
    for row in range(min(limit, len(groups))):
        numbers = [
            *(part[row] for part in graded.parts.values()),
            graded.rewards[row],
            advantages[row],
        ]
        table.add_row(
            Text(prompts[groups[row]].text), Text(graded.completions[row]),
            *(f"{float(number):.3g}" for number in numbers), "yes" if graded.rescued[row] else "",
        )  # fmt: skip
    return table
