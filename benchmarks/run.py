"""`make bench`: runs the benchmark files, prints one ratio table, writes one JSON into benchmarks/results/.

    python benchmarks/run.py                          every op
    python benchmarks/run.py token_logprob -k bf16    one op; further arguments go to pytest

A ratio is a rival's median over ours, measured in the same run; absolute times are this machine's and no more.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections import defaultdict
from datetime import date
from pathlib import Path

import torch

from igpo.ops import _native

HERE = Path(__file__).parent


def run_pytest(files: list[str], options: list[str], output: Path) -> int:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(HERE / "pytest.ini"),
        "--rootdir",
        str(HERE),
    ]
    command += [*files, *options, f"--benchmark-json={output}", "--benchmark-columns=median"]
    return subprocess.run(command, check=False).returncode


def machine() -> dict[str, object]:
    cpu, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        names = [
            x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x
        ]
        cpu = names[0] if names else cpu
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return {
        "date": date.today().isoformat(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "isa": "none" if _native.why_not() else _native.module().isa(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def summarise(report: dict) -> list[dict]:
    """One record per case: our median, effective GB/s, and every rival's median over ours."""
    cases: dict[str, dict[str, dict]] = defaultdict(dict)
    for entry in report["benchmarks"]:
        cases[entry["group"]][entry["extra_info"]["provider"]] = entry
    return [record(name, providers) for name, providers in cases.items() if "igpo" in providers]


def record(name: str, providers: dict[str, dict]) -> dict:
    ours = providers["igpo"]
    median, info = ours["stats"]["median"], ours["extra_info"]
    extras = {k for e in providers.values() for k in e["extra_info"]} - {
        "provider",
        "bytes",
        "counted",
    }
    return {
        "case": name,
        "median_ms": median * 1e3,
        "gb_per_s": info["bytes"] / median / 1e9,
        "bytes": info["bytes"],
        "counted": info["counted"],
        "ratios": {p: e["stats"]["median"] / median for p, e in providers.items() if p != "igpo"},
        **{k: {p: e["extra_info"].get(k) for p, e in providers.items()} for k in sorted(extras)},
    }


def table(records: list[dict]) -> str:
    rivals = list(dict.fromkeys(r for record in records for r in record["ratios"]))
    width = max(len(r["case"]) for r in records)
    heads = "  ".join(f"{rival + ' / ours':>15}" for rival in rivals)
    lines = [f"{'case':{width}}  {'ours ms':>9}  {'GB/s':>6}  {heads}"]
    for r in records:
        cells = [f"{r['ratios'][x]:>14.2f}x" if x in r["ratios"] else f"{'-':>15}" for x in rivals]
        start = f"{r['case']:{width}}  {r['median_ms']:9.3f}  {r['gb_per_s']:6.2f}  "
        lines.append(start + "  ".join(cells))
    return "\n".join(lines)


def main() -> int:
    ops = [a for a in sys.argv[1:] if (HERE / f"bench_{a}.py").exists()]
    options = [a for a in sys.argv[1:] if a not in ops]
    files = [HERE / f"bench_{op}.py" for op in ops] or sorted(HERE.glob("bench_*.py"))
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        status = run_pytest([str(f) for f in files], options, raw)
        if not raw.exists() or not raw.read_text().strip():
            print("no benchmark was timed")
            return status or 1
        records = summarise(json.loads(raw.read_text()))
    where = machine()
    print(
        f"\n{where['cpu']} ({where['isa']}), {where['threads']} threads, torch {where['torch']}\n"
    )
    print(table(records))
    kind = "gpu" if where["gpu"] else "cpu"
    output = HERE / "results" / f"{'-'.join([kind, str(where['date']), *(ops or ['all'])])}.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps({"machine": where, "cases": records}, indent=1) + "\n")
    print(f"\nwritten: {output}")
    return status


if __name__ == "__main__":
    sys.exit(main())
