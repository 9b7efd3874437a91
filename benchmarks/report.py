"""From what the benchmarks wrote down to records and tables.

python benchmarks/report.py RESULT.json     the tables of docs/performance.md
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch
from shapes import DEVICE

from igpo.ops import _native

HERE = Path(__file__).parent


def commit() -> str:
    """The commit of the checkout; IGPO_COMMIT names it for a copy without .git."""
    found = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return found or os.environ.get("IGPO_COMMIT", "unknown")


def machine() -> dict[str, object]:
    cpu, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        lines = [x for x in info.read_text().splitlines() if "model name" in x]
        cpu = lines[0].split(":")[1].strip() if lines else cpu
    gpu = DEVICE == "cuda"
    return {
        "date": date.today().isoformat(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "isa": "none" if _native.why_not() else _native.module().isa(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "device_class": "sm_{}{}".format(*torch.cuda.get_device_capability()) if gpu else None,
        "driver": _driver() if gpu else None,
        "torch": torch.__version__,
        "triton": _triton(),
        "python": platform.python_version(),
        "commit": commit(),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return (done.stdout.strip().splitlines() or ["unknown"])[0]


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def kind(where: dict) -> str:
    """What a baseline belongs to: the GPU, or the processor with its threads."""
    name = where["gpu"] or f"{where['cpu']} {where['isa']} {where['threads']} threads"
    letters = "".join(c if c.isalnum() or c == "." else " " for c in str(name).lower())
    return "-".join(letters.replace(" r ", " ").split())


def record(entry: dict) -> dict:
    """One case: what pytest-benchmark stored, ratios to the fastest of ours, rates, shares of the machine's best."""
    info = entry["extra_info"]
    ours = min(p["median_ms"] for n, p in info["providers"].items() if n.startswith("igpo"))
    work = info["flops"] if info["bound"] == "matmul" else info["bytes"]
    found = {
        name: p
        | {
            "ratio": p["median_ms"] / ours,
            "rate": work / p["median_ms"] / (1e9 if info["bound"] == "matmul" else 1e6),
            "of_best": info["best_ms"] / p["median_ms"],
        }
        for name, p in info["providers"].items()
    }
    wall = entry["stats"]["median"] * 1e3
    return {"case": entry["group"], **info, "end_to_end_ms": wall, "providers": found}


def table(records: list[dict]) -> str:
    """A block per case: the work it counts, then a line per provider."""
    lines = []
    for r in records:
        unit, of = ("TFLOP/s", "matmul") if r["bound"] == "matmul" else ("GB/s", "copy")
        lines += [
            "",
            f"{r['case']}: {r['bytes'] / 1e6:.2f} MB, {r['flops'] / 1e9:.2f} GFLOP; at best {r['best_ms']:.4g} ms"
            + (f"; per {r['unit']}" if "unit" in r else ""),
            f"  {'':14} {'median ms':>10} {'p20':>9} {'p80':>9} {'host ms':>9} {unit:>8} {'of ' + of:>9} "
            f"{'peak MiB':>9} {'/ ours':>7}",
        ]
        for name, p in r["providers"].items():
            lines.append(
                f"  {name:14} {p['median_ms']:10.4f} {p['p20_ms']:9.4f} {p['p80_ms']:9.4f} {p['host_ms']:9.4f} "
                f"{p['rate']:8.2f} {p['of_best']:9.1%} {p['peak_mib']:9.1f} {p['ratio']:6.2f}x"
            )
        lines += [f"  {name:14} not timed: {why}" for name, why in r["skipped"].items()]
    return "\n".join(lines)


def markdown(result: dict) -> str:
    """Least times over that of the fastest of ours, and its peak memory, one line per case."""
    cases = result["cases"]
    names = list(dict.fromkeys(n for c in cases for n in c["providers"] if n != "igpo"))
    lines = [
        f"| case | ours, ms | {' | '.join(names)} | ours, peak MiB |",
        "|---" * (len(names) + 3) + "|",
    ]
    for case in cases:
        rows = [p for name, p in case["providers"].items() if name.startswith("igpo")]
        ours = min(rows, key=lambda p: p["least_ms"])
        found = [case["providers"].get(name) for name in names]
        cells = [f"{p['least_ms'] / ours['least_ms']:.2f}x" if p else "" for p in found]
        name = f"`{case['op']}`{case['case'].removeprefix(case['op'])}"
        lines.append(
            f"| {name} | {ours['least_ms']:.3g} | {' | '.join(cells)} | {ours['peak_mib']:.1f} |"
        )
    return "\n".join(lines)


def programs(result: dict) -> str:
    """A table per program: its providers, then the stages of ours, and what they leave."""
    return "\n\n".join(_program(case) for case in result["cases"] if "unit" in case)


def _program(case: dict) -> str:
    providers, stages = (
        {n: p for n, p in case["providers"].items() if n.startswith("stage-") == wanted}
        for wanted in (False, True)
    )
    ours = case["providers"]["igpo"]["median_ms"]
    name = f"`{case['op']}`{case['case'].removeprefix(case['op'])}"
    lines = [
        f"| {name} | ms per {case['unit']} | tokens/s | TFLOP/s | peak MiB | time / ours | timed on |",
        "|---|---|---|---|---|---|---|",
    ]
    for provider, p in providers.items():
        lines.append(
            f"| {provider} | {p['median_ms']:.4g} | {p['tokens_per_s']:.3g} | {p['rate']:.3g} | {p['peak_mib']:,.0f} "
            f"| {p['median_ms'] / ours:.2f} | {p['subset']} |"
        )
    parts = {n.removeprefix("stage-"): p["median_ms"] for n, p in stages.items()}
    for stage, ms in parts.items():
        said = stages[f"stage-{stage}"]["subset"]
        lines.append(f"| of ours: {stage} | {ms:.4g} | | | | {ms / ours:.3f} | {said} |")
    left = ours - sum(parts.values())
    lines.append(f"| of ours: the rest | {left:.4g} | | | | {left / ours:.3f} | |")
    lines += [f"| {name} | not timed | | | | | {why} |" for name, why in case["skipped"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    read = json.loads(Path(sys.argv[1]).read_text())
    print(markdown(read), programs(read), sep="\n\n")
