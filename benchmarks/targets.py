"""What kernels and programs are meant to reach on one H200, and programs on a CPU; what a result says of it.

    python benchmarks/targets.py [RESULT.json ...]             prints the table
    python benchmarks/targets.py --write RESULT.json ...       puts it into docs/performance.md

Results of a GPU speak of its targets, those of a CPU of the few there are for one. Kernels: V = 126464, bfloat16, cold
L2; shares of the copy bandwidth measured in the same run, of the bytes the algorithm must move. Ours is the fastest of
our rows in each case. A cell without a measurement says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- targets: begin -->", "<!-- targets: end -->"
CPU_BEGIN, CPU_END = "<!-- cpu targets: begin -->", "<!-- cpu targets: end -->"
MISSING = "not yet measured"
LOGITS = "126464 bfloat16"
HEAD = "4096x4096x126464 bfloat16"
MANY_ROWS = (256, 512, 1024, 4096)
ROLLOUT = "rollout 8x200+256 {} T=1.2 block=32 steps=128"
TRAIN_STEP = "train_step {}x200+256 {} inner=4 one mask"
LLADA, SMALL = "32x4096x126464 bfloat16", "32x256x126464 float32"

Cases = Mapping[str, dict]
Found = float | None


@dataclass(frozen=True)
class Target:
    """what: for people. value: from the cases, None where one is missing. at_most: whether less is better."""

    what: str
    value: Callable[[Cases], Found]
    limit: float
    unit: str
    at_most: bool = True

    def met(self, found: float) -> bool:
        return found <= self.limit if self.at_most else found >= self.limit


def ours(cases: Cases, name: str, field: str = "median_ms") -> Found:
    """Of the fastest of our rows in a case."""
    rows = [
        p
        for n, p in cases.get(name, {"providers": {}})["providers"].items()
        if n.startswith("igpo")
    ]
    return min(rows, key=lambda p: p["median_ms"])[field] if rows else None


def rival(cases: Cases, name: str, provider: str) -> Found:
    return cases.get(name, {"providers": {}})["providers"].get(provider, {}).get("median_ms")


def share(name: str, variant: str, rows: tuple[int, ...]) -> Callable[[Cases], Found]:
    """Percent of the machine's best, the lowest over these rows that were measured."""

    def value(cases: Cases) -> Found:
        found = [ours(cases, f"{name} {n}x{LOGITS} {variant}", "of_best") for n in rows]
        return min((100 * x for x in found if x is not None), default=None)

    return value


def quotient(above: Callable[[Cases], Found], below: Callable[[Cases], Found]):
    def value(cases: Cases) -> Found:
        a, b = above(cases), below(cases)
        return None if a is None or b is None else a / b

    return value


def of(name: str) -> Callable[[Cases], Found]:
    return lambda cases: ours(cases, name)


def by(name: str, provider: str) -> Callable[[Cases], Found]:
    return lambda cases: rival(cases, name, provider)


def microseconds(name: str) -> Callable[[Cases], Found]:
    return quotient(of(name), lambda cases: 1e-3)


def extra_gb(head: str, gradient_bytes: int) -> Callable[[Cases], Found]:
    """Peak memory of the call without the gradients it returns."""

    def value(cases: Cases) -> Found:
        mib = ours(cases, f"linear_masked_cross_entropy {HEAD} {head}", "peak_mib")
        return None if mib is None else (mib * 2**20 - gradient_bytes) / 1e9

    return value


def targets() -> list[Target]:
    row_kernels = {
        "token_logprob, forward": ("token_logprob", "forward"),
        "unmask_step, T = 0": ("unmask_step", "T=0 masked=100%"),
        "masked_cross_entropy with its gradient": ("masked_cross_entropy", "scored=100%"),
    }
    found = []
    for what, (op, variant) in row_kernels.items():
        found.append(
            Target(
                f"{what}, 256 rows and more", share(op, variant, MANY_ROWS), 90, "% of copy", False
            )
        )
        found.append(Target(f"{what}, 32 rows", share(op, variant, (32,)), 45, "% of copy", False))
    backward = share("token_logprob", "backward", MANY_ROWS)
    found.append(
        Target("token_logprob, backward alone, 256 rows and more", backward, 85, "% of copy", False)
    )
    return [*found, *unmask_targets(), *linear_targets(), *policy_targets(), *program_targets()]


def unmask_targets() -> list[Target]:
    def case(rows: int, variant: str) -> str:
        return f"unmask_step {rows}x{LOGITS} {variant}"

    greedy, drawn, few = "T=0 masked=100%", "T=1.2 masked=100%", "T=0 masked=25%"
    return [
        Target("unmask_step in all, 32 rows", microseconds(case(32, greedy)), 8, "us"),
        Target("unmask_step in all, 256 rows", microseconds(case(256, greedy)), 20, "us"),
        Target(
            "unmask_step, rate at T = 1.2 over T = 0, 256 rows",
            quotient(of(case(256, greedy)), of(case(256, drawn))),
            0.8,
            "",
            False,
        ),
        Target(
            "unmask_step, time with 75 % not eligible over all, 256 rows",
            quotient(of(case(256, few)), of(case(256, greedy))),
            0.3,
            "",
        ),
    ]


def linear_targets() -> list[Target]:
    op, found = f"linear_masked_cross_entropy {HEAD}", []
    hidden, weight = 4096 * 4096 * 2, 126464 * 4096 * 2
    for head, gradients in (("frozen", hidden), ("trained", hidden + weight)):
        name = f"{op} {head}"
        what = f"linear_masked_cross_entropy, 4096 rows, {head} head"
        found.append(
            Target(
                f"{what}: time over its bare products",
                quotient(of(name), by(name, "products")),
                1.08,
                "",
            )
        )
        for peer in ("quack", "liger-cute"):
            found.append(
                Target(
                    f"{what}: {peer}'s time over ours",
                    quotient(by(name, peer), of(name)),
                    1.0,
                    "",
                    False,
                )
            )
        found.append(Target(f"{what}: extra memory", extra_gb(head, gradients), 1.2, "GB"))
    half = quotient(of(f"{op} trained ignored=50%"), of(f"{op} trained"))
    found.append(
        Target(
            "linear_masked_cross_entropy, time with half the rows ignored over all", half, 0.55, ""
        )
    )
    return found


def policy_targets() -> list[Target]:
    name = "policy_loss 64x256 forward+backward"
    return [
        Target("policy_loss, 64 x 256", microseconds(name), 10, "us"),
        Target(
            "policy_loss, 64 x 256: torch.compile's time over ours",
            quotient(by(name, "compile"), of(name)),
            1.0,
            "",
            False,
        ),
    ]


def first_of(*values: Callable[[Cases], Found]) -> Callable[[Cases], Found]:
    def value(cases: Cases) -> Found:
        return next((x for x in (value(cases) for value in values) if x is not None), None)

    return value


def held_and_peak(name: str) -> Callable[[Cases], Found]:
    """GiB of weights, optimizer and the call."""

    def value(cases: Cases) -> Found:
        peak = ours(cases, name, "peak_mib")
        return None if peak is None else (peak + cases[name]["held_mib"]) / 1024

    return value


def program_targets() -> list[Target]:
    rollout = ROLLOUT.format(LLADA)
    # a quick run trains 16 of the 64 sequences
    batches = [TRAIN_STEP.format(sequences, LLADA) for sequences in (64, 16)]
    what, update = (
        "rollout of LLaDA-8B's geometry, 8 sequences",
        "training of one rollout batch, LoRA",
    )
    cached = quotient(by(rollout, "research"), by(rollout, "dual-cache"))
    return [
        Target(
            f"{what}: time over the bare model forward",
            quotient(of(rollout), by(rollout, "stage-forward")),
            1.03,
            "",
        ),
        Target(
            f"{what}: research form's time over ours",
            quotient(by(rollout, "research"), of(rollout)),
            1.2,
            "",
            False,
        ),
        Target(f"{what}: research form's time over that with caches", cached, 5, "", False),
        Target(
            f"{update}: research form's time over ours",
            first_of(*(quotient(by(name, "research"), of(name)) for name in batches)),
            1.5,
            "",
            False,
        ),
        Target(f"{update}: memory in all", first_of(*map(held_and_peak, batches)), 40, "GiB"),
    ]


def cpu_targets() -> list[Target]:
    name = ROLLOUT.format(SMALL)
    ratio = quotient(by(name, "research"), of(name))
    what = "rollout of a sixteenth of LLaDA-8B's width: research form's time over ours"
    return [Target(what, ratio, 3, "", False)]


def table(cases: Cases, wanted: list[Target] | None = None) -> str:
    lines = ["| target | at most / at least | measured | met |", "|---|---|---|---|"]
    for t in targets() if wanted is None else wanted:
        found = t.value(cases)
        sign, unit = ("<=" if t.at_most else ">="), f" {t.unit}" if t.unit else ""
        value = MISSING if found is None else f"{found:.3g}{unit}"
        met = "" if found is None else "yes" if t.met(found) else "no"
        lines.append(f"| {t.what} | {sign} {t.limit:g}{unit} | {value} | {met} |")
    return "\n".join(lines)


def block(results: list[dict], *, cpu: bool = False) -> str:
    """The table under a line that says where the numbers are from."""
    cases = {c["case"]: c for result in results for c in result["cases"]}
    where = results[0]["machine"] if results else None
    source = f"No run on a {'CPU' if cpu else 'GPU'} yet."
    if where is not None:
        chip = f"{where['cpu']}, {where['threads']} threads"
        if where["gpu"]:
            chip = f"{where['gpu']}, driver {where['driver']}"
        source = f"{chip}, torch {where['torch']}, {where['date']}, {where['commit']}."
    begin, end, wanted = (CPU_BEGIN, CPU_END, cpu_targets()) if cpu else (BEGIN, END, targets())
    return f"{begin}\n{source}\n\n{table(cases, wanted)}\n{end}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    results = [json.loads(path.read_text()) for path in args.results]
    kinds = {bool(result["machine"]["gpu"]) for result in results}
    if len(kinds) > 1:
        parser.error("results must all be of a GPU or all of a CPU: their targets differ")
    cpu = kinds == {False}
    text = block(results, cpu=cpu)
    if args.write:
        page = PAGE.read_text()
        begin, last = (CPU_BEGIN, CPU_END) if cpu else (BEGIN, END)
        start, end = page.index(begin), page.index(last) + len(last)
        PAGE.write_text(page[:start] + text + page[end:])
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
