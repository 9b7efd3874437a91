"""What every benchmark shares: cases, our rows, rivals, the correctness gate, and what is written down.

A benchmark file describes an op at one shape by *providers*: what is called, and returns the op's result. Before a
provider is timed its result must agree with igpo's reference. Bytes and FLOP are those the algorithm cannot avoid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import memory
import peers
import pytest
import rates
import torch
from shapes import COMPILED_ROWS, DEVICE, Head, Rows
from timing import Run, interleaved
from torch import Tensor

from igpo.ops import OPS, BackendError, use_backend

SECONDS_PER_PROVIDER = {"cpu": 1.0, "cuda": 0.15}
COMPILE = "compile"


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    axes: "problem" and "variant" name the case; "rows" and "vocabulary" are what plots draw over. providers:
    "igpo" is ours as `auto` takes it, "igpo-<row>" that row forced, "eager" well-written torch, "compile"
    torch.compile of it, "research" the form public research code uses. gate: the provider's result -> None, or
    AssertionError. bytes, flops: what the algorithm cannot avoid; counted: the sentence that counts them.
    bound: "copy" (GB/s against the copy rate) or "matmul" (FLOP/s against the matmul rate in dtype).
    ungated: providers that give another result on purpose (the bare products of a linear op).
    skipped: rival -> why it is not here.
    """

    op: str
    axes: Mapping[str, object]
    providers: Mapping[str, Run]
    gate: Callable[[object], None]
    bytes: int
    counted: str
    flops: int = 0
    bound: str = "copy"
    dtype: torch.dtype = torch.float32
    ungated: frozenset[str] = frozenset()
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " ".join([self.op, str(self.axes["problem"]), str(self.axes["variant"])]).strip()

    def best(self) -> float:
        """Seconds that the machine's measured rate allows."""
        if self.bound == "matmul":
            return self.flops / rates.matmul_rate(DEVICE, self.dtype)
        return self.bytes / rates.copy_rate(DEVICE)


def axes(problem: Rows | Head, variant: str = "") -> dict[str, object]:
    """The axes of a shapes.Rows or shapes.Head, and what else is varied."""
    sizes = {"rows": problem.rows, "vocabulary": problem.vocabulary}
    return {"problem": str(problem), "variant": variant, **sizes}


def our_rows(op: str) -> list[str]:
    """The rows that a GPU has a choice of."""
    names = [row.name for row in OPS[op].backends if DEVICE in row.devices]
    return [name for name in names if name in ("triton", "cuda")]


def _under(backend: str, function: Callable) -> Callable:
    """function, run on that row; as it is when backend is ""."""
    if not backend:
        return function

    def run(*args: object) -> object:
        with use_backend(backend):
            return function(*args)

    return run


def wanted(request: pytest.FixtureRequest, name: str) -> bool:
    chosen = request.config.getoption("--providers")
    return not chosen or name in chosen.split(",")


def why_no_compile(request: pytest.FixtureRequest, rows: int = 0) -> str:
    if not wanted(request, COMPILE):
        return "not among --providers"
    if request.config.getoption("--tiny"):
        return "--tiny: torch.compile is not run"
    few = (256,) if request.config.getoption("--quick") else COMPILED_ROWS
    if DEVICE == "cuda" and rows and rows not in few:
        return f"compiled for {', '.join(map(str, few))} rows only"
    return ""


def providers(
    op: str,
    request: pytest.FixtureRequest,
    functions: Mapping[str, Callable],
    call: Callable[..., object],
    *,
    kind: str = "",
    rows: int = 0,
    prepare: Callable[[Callable], object] | None = None,
    copy: Callable[[], Tensor] | None = None,
) -> tuple[dict[str, Run], dict[str, str]]:
    """The providers of a case and what was left out, with the reason.

    functions: "igpo", "eager" and other forms, of one signature. call(function) -> the result of one of them on this
    case's inputs. kind: the rivals of benchmarks/peers/ to add, which take the same arguments. prepare(function), not
    timed, makes what call then takes as its second argument; copy likewise for rivals that write into their inputs.
    """

    def run(function: Callable, backend: str = "", before: Callable | None = prepare) -> Run:
        if before is None:
            return Run(_under(backend, lambda: call(function)))
        return Run(
            _under(backend, lambda made: call(function, made)),
            _under(backend, lambda: before(function)),
        )

    found = {"igpo": run(functions["igpo"])}
    found |= {f"igpo-{name}": run(functions["igpo"], name) for name in our_rows(op)}
    rest = {n: f for n, f in functions.items() if n != "igpo" and wanted(request, n)}
    found |= {name: run(function) for name, function in rest.items()}
    rivals, skipped = peers.find(kind, DEVICE)
    rivals = {name: rival for name, rival in rivals.items() if wanted(request, name)}
    reason = why_no_compile(request, rows)
    if reason:
        skipped[COMPILE] = reason
    else:
        torch.compiler.reset()
        found[COMPILE] = run(torch.compile(functions["eager"], dynamic=False))
    for name, function in rivals.items():
        destroys = name in peers.DESTROYS.get(kind, ()) and copy is not None
        found[name] = run(function, before=lambda _: copy()) if destroys else run(function)  # type: ignore[misc]
    return found, skipped


def close(result: object, truth: object, *, rtol: float, atol: float) -> None:
    """Every tensor of result agrees with truth; the message says which does not."""
    for i, (a, b) in enumerate(_pairs(result, truth)):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=rtol, atol=atol, msg=lambda m, i=i: f"result {i}: {m}"
        )


def near(result: object, truth: object, *, error: float) -> None:
    """Every tensor of result is within `error` of truth in the relative 2-norm."""
    for i, (a, b) in enumerate(_pairs(result, truth)):
        found = float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30))
        assert found <= error, f"result {i}: relative error {found:.2e}, at most {error:.0e}"


def _pairs(result: object, truth: object) -> list[tuple[Tensor, Tensor]]:
    results, truths = _tensors(result), _tensors(truth)
    assert len(results) == len(truths), f"{len(results)} results, expected {len(truths)}"
    return list(zip(results, truths, strict=True))


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach()]
    assert isinstance(value, tuple | list), f"a provider returned {type(value).__name__}"
    return [t for entry in value for t in _tensors(entry)]


def gated(case: Case) -> tuple[dict[str, Run], dict[str, str]]:
    """The providers that passed their gate, and why the others are not timed. Only a peer may be wrong, and
    only ours must fit into memory."""
    passed, skipped = {}, dict(case.skipped)
    for name, run in case.providers.items():
        try:
            result = run()
            if name not in case.ungated:
                case.gate(result)
        except BackendError as reason:
            if name == "igpo":
                raise
            skipped[name] = str(reason)
        except peers.failures() as error:
            no_room = isinstance(error, torch.OutOfMemoryError) and not name.startswith("igpo")
            if name not in peers.NAMES and not no_room:
                raise
            wrong = "wrong" if isinstance(error, AssertionError) else "failed"
            skipped[name] = f"{wrong}: {type(error).__name__}: {str(error).strip()[:300]}"
        else:
            passed[name] = run
    return passed, skipped


def measure(benchmark, case: Case) -> None:
    """Gates every provider, then times all of them in turn. pytest-benchmark's own numbers are the wall time of
    "igpo" from call to result; the others are in extra_info."""
    runs, skipped = gated(case)
    if benchmark.disabled:
        benchmark.pedantic(runs["igpo"])
        return
    timings = interleaved(runs, DEVICE, SECONDS_PER_PROVIDER[DEVICE])
    best = case.best()
    benchmark.group = case.name
    benchmark.extra_info |= {
        "op": case.op,
        "axes": dict(case.axes),
        "bytes": case.bytes,
        "flops": case.flops,
        "bound": case.bound,
        "counted": case.counted,
        "best_ms": best * 1e3,
        "copy_gb_per_s": rates.copy_rate(DEVICE) / 1e9,
        "providers": {
            name: timing.milliseconds()
            | {"rounds": timing.rounds, "peak_mib": memory.peak_mib(runs[name], DEVICE)}
            for name, timing in timings.items()
        },
        "skipped": skipped,
    }

    def to_the_result() -> None:
        runs["igpo"]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(to_the_result, rounds=5, warmup_rounds=1)
