"""Compiles Triton kernels for GPUs that are not there, and reads registers, spills and access widths from the cubins.

    python tests/compiling.py token_logprob 80 90   JSON: one record per case of tests/triton_cases/token_logprob.py
                                                    and architecture

Needs a process in which Triton is not interpreted; tests/test_triton_compile.py starts one per op.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """module, kernel: igpo.kernels.<module>.<kernel>.   signature: argument -> Triton type, pointers assumed to be
    16-byte aligned and `divisible` integers to be multiples of 16, as at run time.   wide: instructions the SASS must
    hold, by their beginnings.   num_warps, num_stages: those of the launcher."""

    module: str
    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    divisible: tuple[str, ...] = ()
    wide: tuple[str, ...] = ("LDG.E.128", "STG.E.128")
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        kinds = "-".join(str(v) for v in (*self.signature.values(), *self.constexprs.values()))
        return f"{self.kernel} {kinds}"


def compile_case(case: Case, arch: int) -> dict[str, object]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"igpo.kernels.{case.module}"), case.kernel)
    names = kernel.arg_names
    signature = {n: case.signature.get(n, "constexpr") for n in names}
    constexprs = {(names.index(n),): v for n, v in case.constexprs.items()}
    missing = set(names) - set(case.signature) - set(case.constexprs)
    assert not missing, f"{case.kernel}: the case gives no type for {sorted(missing)}"
    aligned = [n for n in names if signature[n].startswith("*") or n in case.divisible]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options=dict(case.options)
    )
    return {"case": case.name, "arch": arch, **inspect(compiled.asm["cubin"])}


def tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def inspect(cubin: bytes) -> dict[str, object]:
    """registers, stack and local bytes (spills), and how often each global access instruction occurs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(tool("cuobjdump"), "--dump-resource-usage", str(path))
        sass = _run(tool("nvdisasm"), "-c", str(path))
    found = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return {
        "registers": found["REG"],
        "spills": found["STACK"] + found["LOCAL"],
        "shared": found["SHARED"],
        "accesses": dict(Counter(re.findall(r"\b((?:LDG|STG|LDGSTS)\.[A-Z0-9_.]+)", sass))),
    }


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    op, archs = sys.argv[1], [int(arch) for arch in sys.argv[2:]]
    sys.modules["compiling"] = sys.modules["__main__"]  # the cases import Case from here
    cases = importlib.import_module(f"triton_cases.{op}").CASES
    json.dump([compile_case(case, arch) for arch in archs for case in cases], sys.stdout)


if __name__ == "__main__":
    main()
