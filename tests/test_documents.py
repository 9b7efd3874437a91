"""The README's code runs, its tables are what the programs print, and docs/learning.md shows what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from igpo.config import AlgorithmConfig, RolloutConfig
from igpo.demo import study
from igpo.ops import OPS
from igpo.ops.__main__ import rows
from igpo.rl import advantage
from igpo.rl.algorithms import ALGORITHMS, Composition, build_algorithm
from igpo.rl.parts import OWN_ADVANTAGES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets_run(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_there_are_snippets() -> None:
    assert SNIPPETS


def test_the_table_of_backends_is_that_of_the_program() -> None:
    for name, backend, _, checked in rows(OPS["unmask_step"]):
        line = rf"^{name} +{backend} +.*{re.escape(checked)}$"
        assert re.search(line, README, re.MULTILINE), (name, backend)


def test_what_never_ran_on_a_gpu_is_said_so() -> None:
    listed = [row for op in OPS.values() for row in rows(op)]
    gpu = [row for row in listed if row[1] in ("cuda", "triton")]
    assert len(gpu) == 2 * len(OPS), "every op has both"
    never = all(checked == "never run on a GPU" for *_, checked in gpu)
    assert never == ("No GPU row has run on a GPU yet" in README)


def test_every_op_and_algorithm_is_named() -> None:
    for name in (*OPS, *ALGORITHMS):
        assert f"`{name}`" in README, f"README.md does not name {name}"


def test_every_algorithm_is_described_with_its_line() -> None:
    page = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    source = (ROOT / "igpo" / "rl" / "algorithms.py").read_text(encoding="utf-8")
    found = re.finditer(r'^    ("(\w+)": Composition\(.*\),)$', source, re.MULTILINE)
    lines = {match[2]: match[1] for match in found}
    assert set(lines) == set(ALGORITHMS)
    baselines = {"grpo_resample", "trace_in_group", "trace_as_hints"}
    for name, line in lines.items():
        assert f"`{name}`" in page, name
        assert name in baselines or f"### {name}\n\n```python\n{line}\n```" in page, line


def test_the_table_of_costs_is_that_of_the_measurement() -> None:
    page = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    measured = sorted((ROOT / "benchmarks" / "results").glob("*-algorithm_cost.json"))[-1]
    for x in json.loads(measured.read_text(encoding="utf-8"))["rows"]:
        counts = [
            x["draws"],
            x["inner updates"],
            *(x[k] for k in ("old", "reference", "first pass", "train")),
        ]
        line = f"| `{x['name']}` | " + " | ".join(f"{count:g}" for count in counts)
        assert line in page, line


def test_the_worked_example_of_an_algorithm_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    function, line = re.findall(
        r"```python\n(.*?)```", page.partition("## Adding one")[2], re.DOTALL
    )
    made: dict = {}
    exec(compile(function, "docs/algorithms.md", "exec"), vars(advantage).copy(), made)
    monkeypatch.setitem(OWN_ADVANTAGES, "best", lambda cfg: made["best"])
    composition = eval(line.partition(":")[2].strip().rstrip(","), {"Composition": Composition})
    monkeypatch.setitem(ALGORITHMS, "raft", composition)
    cfg = AlgorithmConfig(algorithm="raft")
    built = build_algorithm(cfg, RolloutConfig(), lambda rollouts, prompts: rollouts, pad_id=0)  # type: ignore[arg-type, return-value]
    assert built.advantage is made["best"]


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_learning_table_is_that_of_the_measurements() -> None:
    summary = json.loads((ROOT / "docs" / "learning.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "learning.md").read_text(encoding="utf-8")
    assert study.table(summary) in text
    lines = study.read(ROOT / "docs" / "learning.jsonl")
    assert len(lines) == summary["seeds"] * len(summary["arms"])
    for arm, found in summary["arms"].items():
        assert found == json.loads(
            json.dumps(study.summarise([x for x in lines if x["name"] == arm]))
        )
