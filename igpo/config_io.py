"""Reads and writes the tree of igpo/config.py: YAML files, `key=value` overrides, the help text.

A key is a leaf name (`learning_rate`) or the end of its path (`rl.inpaint.eta_low`, `inpaint.eta_low`). Nothing is
accepted in silence: an unknown key is an error that names the nearest one, a value of another type is an error that
names the key.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import io
import math
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from .config import Config, ConfigError

# other projects' spellings of our keys, understood here and nowhere else
ALIASES = {
    "block_size": "block_length",
    "steps": "diffusion_steps",
    "sampling_steps": "diffusion_steps",
    "unmasking": "remasking",
    "max_new_tokens": "max_completion_length",
    "gen_length": "max_completion_length",
    "model": "model_name_or_path",
    "min_chunk_size": "chunk_min",
    "max_chunk_size": "chunk_max",
}
_YAML_BREAKS = frozenset("\n\r\x85\u2028\u2029\ufeff")  # a plain YAML scalar does not keep these
# keys of TRL that have no counterpart, and what to do instead
ELSEWHERE = {
    "gradient_accumulation_steps": "it follows: prompts_per_step * num_generations / per_device_train_batch_size",
    "generation_batch_size": "use prompts_per_step * num_generations",
    "steps_per_generation": "it follows: prompts_per_step * num_generations / per_device_train_batch_size",
    "num_train_epochs": "use max_steps",
    "bf16": "use dtype=bfloat16",
    "fp16": "use dtype=bfloat16",
    "lora_dropout": "there is none: dropout would make the first on-policy ratio differ from 1",
    "mask_id": "the mask token is the tokenizer's",
    "mask_token_id": "the mask token is the tokenizer's",
}
NONE = ("none", "null")

DTYPES = ("auto", "float32", "bfloat16")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
TRACKERS = ("tensorboard", "wandb", "trackio")

T = TypeVar("T")


@dataclass(frozen=True)
class Leaf:
    """One key of a tree: its place, its type, its default, the comment in the source."""

    path: tuple[str, ...]
    kind: Any
    default: Any
    comment: str

    @property
    def type_name(self) -> str:
        return self.kind.__name__ if isinstance(self.kind, type) else str(self.kind)


def load(files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> Config:
    """The defaults, then the files in their order, then the overrides ("key=value"). Raises ConfigError."""
    cfg = Config()
    for file in files:
        cfg = assign(cfg, read(file), str(file))
    return assign(cfg, map(split, overrides), "command line")


def validate(cfg: Config, need: Sequence[str] = ()) -> None:
    """Checks the keys of programs, and that the data files `need` (keys of DataConfig) exist. Raises ConfigError.

    What belongs to a stage or an algorithm is checked where it is used.
    """
    t = cfg.train
    for key, value, names in (
        ("dtype", cfg.model.dtype, DTYPES),
        ("lr_scheduler_type", t.lr_scheduler_type, SCHEDULES),
        *(("report_to", name, TRACKERS) for name in t.report_to),
    ):
        _require(value in names, key, f"be one of {', '.join(names)}", value)
    for key in ("max_steps", "prompts_per_step", "per_device_train_batch_size", "logging_steps"):
        _require(getattr(t, key) >= 1, key, "be at least 1", getattr(t, key))
    for key in (
        "learning_rate",
        "warmup_steps",
        "weight_decay",
        "save_steps",
        "eval_steps",
        "num_threads",
    ):
        _require(getattr(t, key) >= 0, key, "not be negative", getattr(t, key))
    for key in ("adam_beta1", "adam_beta2"):
        _require(0 <= getattr(t, key) < 1, key, "lie in [0, 1)", getattr(t, key))
    _require(t.adam_epsilon > 0, "adam_epsilon", "be positive", t.adam_epsilon)
    _require(t.max_grad_norm > 0, "max_grad_norm", "be positive", t.max_grad_norm)
    limit = t.save_total_limit
    _require(limit is None or limit >= 1, "save_total_limit", "be none or at least 1", limit)
    _require(
        not cfg.lora.use_lora or cfg.model.model_name_or_path is not None,
        "model_name_or_path", "name a folder when use_lora is true", None,
    )  # fmt: skip
    _require(cfg.lora.lora_r >= 1, "lora_r", "be at least 1", cfg.lora.lora_r)
    for key in (*need, *(("eval_file",) if t.eval_steps else ())):
        file = getattr(cfg.data, key)
        _require(file is not None, key, "name a JSONL file", file)
        is_place = file.endswith((".jsonl", ".json", ".csv", ".parquet")) and "://" not in file
        place = Path(file) if Path(file).exists() else Path(file.partition("=")[2])
        _require(not is_place or place.is_file(), key, "name a file that exists", file)


def _require(condition: bool, key: str, rule: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"{key} must {rule}, got {got!r}.")


def split(override: str) -> tuple[str, str]:
    """ "key=value" -> (key, value)."""
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(
            f"command line: {override!r} must be key=value or the name of a YAML file."
        )
    return key, value


def read(file: str | Path) -> list[tuple[str, Any]]:
    """The (dotted key, value) pairs of a YAML file, whose sections may be nested or left out."""
    import yaml

    try:
        tree = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{file}: must hold keys and values, got {type(tree).__name__}.")
    return pairs(tree or {})


def pairs(tree: Mapping[Any, Any], path: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    """(dotted key, value) of nested mappings."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        place = (*path, str(key))
        found += pairs(value, place) if isinstance(value, Mapping) else [(".".join(place), value)]
    return found


def assign(record: T, items: Iterable[tuple[str, Any]], where: str) -> T:
    """The record (a tree of dataclasses) with the keys of `items` set; `where` begins the messages."""
    known = leaves(type(record))
    changes: dict[tuple[str, ...], Any] = {}
    for key, value in items:
        name = resolve(key, known, where)
        leaf = known[name]
        if where != "command line" and leaf.path in changes:
            raise ConfigError(f"{where}: {name} is set twice.")
        changes[leaf.path] = convert(value, leaf.kind, f"{where}: {name}")
    return _rebuild(record, changes)


def dump(record: Any) -> str:
    """YAML text; `read` gives back an equal tree."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes what YAML would read back as a line break."""

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = '"' if _YAML_BREAKS & set(value) else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style)

    Dumper.add_representer(str, text)
    return yaml.dump(_plain(record), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def flatten(record: Any) -> dict[str, Any]:
    """Dotted key -> value, lists for tuples: what JSON can hold."""
    return dict(pairs(_plain(record)))


@functools.cache
def leaves(cls: type) -> Mapping[str, Leaf]:
    """The keys of a tree of dataclasses, by dotted path."""
    return {".".join(leaf.path): leaf for leaf in _leaves(cls, ())}


def resolve(key: str, known: Mapping[str, Leaf], where: str) -> str:
    """The dotted path that `key` means."""
    key = key.replace("-", "_")
    head, _, last = key.rpartition(".")
    key = f"{head}.{ALIASES.get(last, last)}".lstrip(".")
    if key in known:
        return key
    found = [name for name in known if name.endswith(f".{key}")]
    if len(found) == 1:
        return found[0]
    if last in ELSEWHERE:
        raise ConfigError(f"{where}: {key!r} is not a key: {ELSEWHERE[last]}.")
    near = nearest(key, [s for name in known for s in (name, name.rpartition(".")[2])])
    raise ConfigError(f"{where}: unknown key {key!r}. The nearest one is {near!r}.")


def nearest(word: str, words: Iterable[str]) -> str:
    return difflib.get_close_matches(word, list(words), n=1, cutoff=0.0)[0]


def show(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return str(value)


def convert(value: Any, kind: Any, name: str) -> Any:
    """`value` (text of the command line, or a YAML value) as `kind`; "none" and null are None. Raises ConfigError."""
    if typing.get_origin(kind) is types.UnionType:
        (inner,) = (k for k in typing.get_args(kind) if k is not type(None))
        return None if _is_none(value) else convert(value, inner, name)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return tuple(convert(item, inner, name) for item in _items(value))
    try:
        return _SCALARS[kind](value)
    except ValueError:
        expected = _EXPECTED[kind]
        raise ConfigError(
            f"{name} must be {expected}, got {value!r} ({type(value).__name__})."
        ) from None


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.lower() in NONE)


def _items(value: Any) -> Sequence[Any]:
    if _is_none(value):
        return ()
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return value if isinstance(value, list | tuple) else [value]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _bool(value: Any) -> bool:
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower())
    if not isinstance(value, bool):
        raise ValueError
    return value


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


_SCALARS: dict[type, Callable[[Any], Any]] = {str: _text, bool: _bool, int: _int, float: _float}
_EXPECTED = {
    str: "text (in YAML, quote it)",
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
}


def _plain(record: Any) -> Any:
    if is_dataclass(record):
        return {item.name: _plain(getattr(record, item.name)) for item in fields(record)}
    return list(record) if isinstance(record, tuple) else record


def _rebuild(record: Any, changes: Mapping[tuple[str, ...], Any]) -> Any:
    here: dict[str, Any] = {}
    for name in {path[0] for path in changes}:
        below = {path[1:]: value for path, value in changes.items() if path[0] == name}
        here[name] = below[()] if () in below else _rebuild(getattr(record, name), below)
    return replace(record, **here)


def _leaves(cls: type, path: tuple[str, ...]) -> Iterator[Leaf]:
    kinds, comments = typing.get_type_hints(cls), _comments(cls)
    defaults = cls()
    for item in fields(cls):
        kind, place = kinds[item.name], (*path, item.name)
        if is_dataclass(kind):
            yield from _leaves(typing.cast(type, kind), place)
        else:
            yield Leaf(place, kind, getattr(defaults, item.name), comments.get(item.name, ""))


def _comments(cls: type) -> dict[str, str]:
    """Field -> the comments on its lines of the source."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except OSError:  # made at run time, or shipped without sources: help without comments
        return {}
    lines: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0]] = token.string.lstrip("# ")
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found[node.target.id] = " ".join(lines[i] for i in span if i in lines)
    return found
