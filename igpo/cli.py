"""The command line: finds the command, reads its configuration, imports its program, calls it.

Nothing beyond the standard library is imported before a command needs it, so that help and `igpo env` work without the
[train] extras.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import config_io
from . import options as opt
from .config import Config, ConfigError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
TRACEBACK = "--traceback"
DRY_RUN = "--dry-run"
AUTO = "auto"


@dataclass(frozen=True)
class Command:
    """`target` is "module:function", called with (cfg if tree) and (options if it has any). `words` is the option that
    takes the words of the command line which are no options, if not YAML files. `dry_run` is called instead of
    `target` with --dry-run, and takes opt.DryRunOptions too. `published`: it starts from its algorithm's preset.
    `implied`, called with the options, gives keys they set: over the files', under the command line's. `aliases` are
    the command's own spellings of keys."""

    summary: str
    target: str
    tree: bool = True
    options: type | None = None
    words: str | None = None
    dry_run: str | None = None
    published: bool = False
    implied: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    preset: str | None = (
        AUTO  # published settings beneath all that is given; auto: train has its algorithm's
    )


COMMANDS = {
    "train": Command(
        "reinforcement learning: IGPO, GRPO and kin", "igpo.train:run", dry_run="igpo.dry_run:train", published=True
    ),
    "sft": Command("masked supervised fine-tuning", "igpo.sft:run", dry_run="igpo.dry_run:sft"),
    "eval": Command("accuracy on a task or a file of problems", "igpo.evaluate:run", options=opt.EvalOptions,
        implied="igpo.evaluation_tasks:settings", aliases={"length": "eval_lengths"}),
    "generate": Command("completions of prompts", "igpo.generate:run", options=opt.GenerateOptions),
    "report": Command("one page that compares runs", "igpo.report:run", False, opt.ReportOptions, "runs"),
    "data": Command("sizes, lengths and overlap of the data", "igpo.dataset_report:run", options=opt.DataOptions),
    "rewrite": Command("concise traces, verified", "igpo.rewrite:run", options=opt.RewriteOptions),
    "puzzles": Command("writes generated problems", "igpo.puzzles:run", False, opt.PuzzleOptions),
    "tokenizer": Command("trains a tokenizer with a mask token", "igpo.tokenizer:run", False, opt.TokenizerOptions),
    "demo": Command("GRPO against IGPO on a small problem, on the CPU", "igpo.demo:main", False, opt.DemoOptions),
    "ops": Command("which backend of which op runs here, or why not", "igpo.ops.__main__:main", False),
    "env": Command("versions and machine, for bug reports", "igpo.cli:env", False),
}  # fmt: skip

# what `pip install igpo[train]` brings, by the name it is imported under
TRAIN_EXTRA = ("yaml", "rich", "transformers", "tokenizers", "safetensors", "tensorboard", "matplotlib")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0; 1: the run failed; 2: it could not start as asked; 130: interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        _write(overview())
        return OK if words else USAGE
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        near = config_io.nearest(name, COMMANDS)
        return _fail("igpo", f"unknown command {name!r}. The nearest one is {near!r}.", USAGE)
    if {"-h", "--help"} & set(rest):
        _write(usage(name))
        return OK
    if TRACEBACK in rest:
        rest.remove(TRACEBACK)
        _call(COMMANDS[name], rest)
        return OK
    return _guarded(name, rest)


def _guarded(name: str, words: Sequence[str]) -> int:
    """One line instead of a traceback for what a user can understand; a defect of igpo keeps its traceback."""
    where = f"igpo {name}"
    try:
        _call(COMMANDS[name], words)
    except KeyboardInterrupt:
        return _fail(where, "interrupted", INTERRUPTED)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in TRAIN_EXTRA:
            raise
        return _fail(where, f"{error.name} is not installed: pip install 'igpo[train]'", USAGE)
    except (ValueError, FileNotFoundError) as error:
        return _fail(where, str(error), USAGE)
    except (RuntimeError, ArithmeticError, OSError) as error:
        return _fail(where, f"{error} ({TRACEBACK} shows where)", FAILED)
    return OK


def _call(command: Command, words: Sequence[str]) -> None:
    target = command.target
    if DRY_RUN in words and command.dry_run is not None:
        words, target = [word for word in words if word != DRY_RUN], command.dry_run
        command = replace(command, options=opt.DryRunOptions)
    arguments = parse(command, words)
    _function(target)(*arguments)


def _function(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def parse(command: Command, words: Sequence[str]) -> list[Any]:
    """The arguments of a command's function. Raises ConfigError."""
    files, given = _sort(command, words)
    if command.words is not None and files:
        given = [(command.words, ",".join(files)), *given]
        files = []
    if files and not command.tree:
        raise ConfigError(
            f"command line: {files[0]!r} must be key=value; this command takes no file."
        )
    arguments: list[Any] = []
    options = [_filled(command.options, given)] if command.options else []
    if command.implied is not None:
        given = [*_function(command.implied)(*options), *given]
    if command.tree:
        cfg, said = _tree(command, files, given)
        config_io.validate(cfg)
        if os.environ.get("RANK", "0") == "0":  # torchrun's: one of the processes says it
            sys.stderr.write(said)
        arguments.append(cfg)
    return [*arguments, *options]


def _tree(
    command: Command, files: Sequence[str], given: Sequence[tuple[str, str]]
) -> tuple[Config, str]:
    """The defaults, a preset, the files, the command line, later ones winning; and a line on the preset, if any."""
    layers = [
        *((config_io.read(file), file) for file in files),
        (_own(Config, given), "command line"),
    ]
    cfg, name = _laid(Config(), layers), _filled(Start, given).preset
    if name is None or (name == AUTO and not command.published):
        return cfg, ""
    presets, algorithm = importlib.import_module("igpo.rl.presets"), cfg.rl.algorithm
    name = presets.preset_of(algorithm) if name == AUTO else name
    if name is None:
        return cfg, f"algorithm {algorithm} has no preset: what is not given is the default\n"
    if name not in presets.PRESETS:
        names = ", ".join(presets.PRESETS)
        raise ConfigError(
            f"command line: preset must be auto, none or one of {names}, got {name!r}."
        )
    preset, but = dict(presets.PRESETS[name]), ""
    if cfg.model.model_name_or_path is None and preset.pop("lora", None):
        but = ", but for its LoRA: the model is new"
    cfg = _laid(Config(), [(config_io.pairs(preset), f"preset {name}"), *layers])
    own = presets.preset_of(cfg.rl.algorithm)
    if own != name:
        raise ConfigError(
            f"command line: preset must be {own or 'none'} with algorithm {cfg.rl.algorithm!r}, got {name!r}. "
            "Leave out one of the two; or set preset=none, and the settings one by one."
        )
    return cfg, f"preset {name} beneath what is given{but} (preset=none: the defaults)\n"


def _laid(cfg: Config, layers: Sequence[tuple[Any, str]]) -> Config:
    for items, where in layers:
        cfg = config_io.assign(cfg, items, where)
    return cfg


def _own(cls: type, given: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [pair for pair in given if pair[0] in config_io.leaves(cls)]


def _filled(cls: type, given: Sequence[tuple[str, str]]) -> Any:
    """A record of `cls` with those of the given keys that are its own."""
    return config_io.assign(cls(), _own(cls, given), "command line")


def _sort(command: Command, words: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Words as (YAML files, pairs of full key and value): key=value, --key=value, --key value, --flag for a bool."""
    files: list[str] = []
    given: list[tuple[str, str]] = []
    known = _keys(command)
    left: Iterator[str] = iter(words)
    for word in left:
        option, (key, equals, value) = word.startswith("--"), word.removeprefix("--").partition("=")
        if not option and not equals:
            files.append(word)
            continue
        name = config_io.resolve(command.aliases.get(key, key), known, "command line")
        if not equals:
            value = "true" if known[name].kind is bool else next(left, None)
        if value is None:
            raise ConfigError(f"command line: {word} needs a value.")
        given.append((name, value))
    return files, given


def _keys(command: Command) -> dict[str, config_io.Leaf]:
    parts = [
        *([Start, Config] if command.tree else []),
        *([command.options] if command.options else []),
    ]
    return {key: leaf for part in parts for key, leaf in config_io.leaves(part).items()}


def overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: igpo COMMAND [CONFIG.yaml ...] [key=value ...]",
            "",
            *lines,
            "",
            "`igpo COMMAND --help` lists the keys. `--key value` is the same as key=value; later ones win.",
        ]
    )


def usage(name: str) -> str:
    """The keys of a command with type, default and meaning."""
    command = COMMANDS[name]
    files = "[CONFIG.yaml ...] " if command.tree else ""
    if command.words is not None:
        files = f"{command.words.upper()} ... "
    lines = [f"usage: igpo {name} {files}[key=value ...]", "", f"{command.summary}."]
    section: tuple[str, ...] | None = None
    for leaf in _keys(command).values():
        if leaf.path[:-1] != section:
            section = leaf.path[:-1]
            lines += ["", f"{'.'.join(section)}:"] if section else [""]
        comment = f"  # {leaf.comment}" if leaf.comment else ""
        default = config_io.show(leaf.default)
        lines.append(f"  {leaf.path[-1]}={default}  ({leaf.type_name}){comment}")
    if command.dry_run is not None:
        lines += [
            "",
            f"{DRY_RUN}: memory, work and time, data, and two steps with a small model; nothing is kept. "
            "tflops=…: the rate that times are planned with, where none was measured.",
        ]
    if command.tree:
        aliases = {**config_io.ALIASES, **command.aliases}
        spellings = ", ".join(f"{alias} = {key}" for alias, key in aliases.items())
        lines += ["", f"Also understood: {spellings}."]
    return "\n".join(lines)


def env() -> None:
    """`igpo env`."""
    from .environment import report

    _write(json.dumps(report(), indent=1))


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")


def _fail(where: str, message: str, status: int) -> int:
    sys.stderr.write(f"{where}: {message}\n")
    return status
