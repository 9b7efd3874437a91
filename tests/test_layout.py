"""The house stands: who may import whom, what every op consists of, and what source files may not hold.

Each assertion says what to do about it. docs/architecture.md explains the floors.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import igpo.ops

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "igpo").rglob("*.py")) + sorted((ROOT / "kernels" / "gpu").glob("*.py"))
SOURCES = [path for path in SOURCES if "igpo/kernels" not in path.as_posix()]
TESTS = sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "benchmarks").glob("*.py"))
NATIVE = [p for folder in ("csrc", "kernels/gpu") for p in sorted((ROOT / folder).glob("*.[ch]*"))]

RECORDS = {"types", "config", "options", "ranks", "text"}
STAGES = {"data", "canvas", "rollout", "rewards", "models"}
COMPONENTS = {"explorer", "advantage", "likelihood", "objective"}
OPS = [name for name in igpo.ops.__all__ if callable(getattr(igpo.ops, name)) and name.islower()]
OPS = [name for name in OPS if name != "use_backend" and not name.endswith("_")]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path: Path) -> list[str]:
    """igpo/rl/explorer.py -> [rl, explorer]; kernels/gpu/x.py -> [kernels, x]."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ["kernels", *parts[2:]] if parts[0] == "kernels" else list(parts[1:])


def imports(path: Path) -> Iterator[str]:
    """What a file imports of igpo, as dotted names below it; "" is the package itself."""
    package = module_of(path)[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if alias.name.split(".")[0] == "igpo"]
            yield from (name.removeprefix("igpo").lstrip(".") for name in found)
        elif isinstance(node, ast.ImportFrom) and (
            node.level or (node.module or "").split(".")[0] == "igpo"
        ):
            base = package[: len(package) - (node.level - 1)] if node.level else []
            module = (node.module or "").removeprefix("igpo").lstrip(".")
            start = ".".join([*base, *([module] if module else [])])
            yield from ([start] if start else [alias.name for alias in node.names])


def floor(name: str) -> int:
    """0 records, 1 ops and kernels, 2 stages, 3 rl, 4 programs."""
    top = name.split(".")[0]
    if top in RECORDS:
        return 0
    if top in ("ops", "kernels", "_C"):
        return 1
    return 2 if top in STAGES else 3 if top == "rl" else 4


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    own = ".".join(module_of(path))
    for other in imports(path):
        if other in ("", "__version__"):
            continue
        up = floor(other) > floor(own)
        assert not up, f"{name_of(path)} imports igpo.{other}, which is on a floor above it"
        aside = floor(own) == floor(other) in (0, 2) and own.split(".")[0] != other.split(".")[0]
        assert not aside, (
            f"{name_of(path)} imports igpo.{other}: pass its results as records instead"
        )
        if own.startswith("rl.") and own.split(".")[1] in COMPONENTS:
            mine = own.split(".")[1]
            components = other.startswith("rl.") and other.split(".")[1] in COMPONENTS - {mine}
            assert not components, (
                f"{name_of(path)} imports igpo.{other}: compose them in algorithms.py"
            )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "place",
    ["igpo/ops/{}.py", "tests/ops/test_{}.py", "benchmarks/bench_{}.py"],
)
def test_every_op_has_its_files(op: str, place: str) -> None:
    assert (ROOT / place.format(op)).is_file(), f"add {place.format(op)}"


def test_op_list_is_that_of_the_dispatcher() -> None:
    assert sorted(OPS) == sorted(igpo.ops.OPS)


@pytest.mark.parametrize("op", OPS)
def test_op_docstrings_are_contracts(op: str) -> None:
    text = getattr(igpo.ops, op).__doc__ or ""
    for section in ("Args:", "Returns:", "Raises:", "Source:"):
        assert section in text, f"igpo.ops.{op}: the docstring has no {section} section"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sources_say_what_they_are_for(path: Path) -> None:
    tree = parse(path)
    if tree.body:
        assert ast.get_docstring(tree), (
            f"{name_of(path)}: one sentence at the top says what it is for"
        )


@pytest.mark.parametrize("path", [*SOURCES, *TESTS, *NATIVE], ids=name_of)
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    most = 450 if path in NATIVE or path in TESTS else 350
    assert lines <= most, (
        f"{name_of(path)} has {lines} lines, at most {most}: split it by what it is about"
    )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_are_short(path: Path) -> None:
    if path.is_relative_to(ROOT / "kernels"):
        pytest.skip("kernels may be long")
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        start = node.body[0].lineno
        if ast.get_docstring(node) and len(node.body) > 1:
            start = node.body[1].lineno
        lines = (node.end_lineno or start) - start + 1
        assert lines <= 40, f"{name_of(path)}: {node.name} has {lines} lines, at most 40"


BANNED = {
    r"except\s*(Exception|BaseException)?\s*:": "name the error that is expected",
    r"manual_seed\(": "randomness comes from types.Seed or _philox",
    r"(?<![\w.])print\(": "use igpo.logging",
    r"\b(TODO|FIXME|XXX)\b": "finish it or open an issue",
    r"NotImplementedError": "leave out what is not there",
    r"(?<![\w.])(eval|exec)\(": "parse it",
}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sources_hold_nothing_banned(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        for pattern, advice in BANNED.items():
            assert not re.search(pattern, line), (
                f"{name_of(path)}:{number}: {line.strip()!r}; {advice}"
            )


def test_kernels_are_not_a_top_level_package() -> None:
    advice = "a package `kernels` would shadow the one of Hugging Face"
    assert not (ROOT / "kernels" / "__init__.py").exists(), advice
