"""The CUDA kernels in igpo._C: no spills, 16 bytes at a time where it counts; and what it says without a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache

import pytest
import torch

from igpo.ops import OPS, _native

pytest.importorskip("triton", reason="triton is not installed: its package has the disassembler")

from compiling import tool

ARCHS = ("80", "90", "100")

# kernels that must read 16 bytes at a time, straight into registers or by asynchronous copies to shared memory
WIDE = (
    "merge_hints_kernel",
    "forward_mask_kernel",
    "policy_loss_kernel",
    "policy_loss_rows_kernel",
    "row_kernel",
    "part_kernel",
    "gradient_kernel",
    "search_kernel",
    "scan_kernel",
)


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def built() -> str:
    """The file of the module; skips where it has no CUDA kernels to look at."""
    if reason := _native.why_not():
        pytest.fail(f"the module cannot be tested: {reason}")
    if not hasattr(_native.module(), "cuda"):
        pytest.skip("igpo._C was built without CUDA")
    return str(_native.module().__file__)


@cache
def resources() -> dict[str, dict[str, dict[str, int]]]:
    """architecture -> mangled kernel -> REG, STACK, LOCAL, …"""
    found: dict[str, dict[str, dict[str, int]]] = {}
    kernels: dict[str, dict[str, int]] = {}
    name = ""
    for line in output(tool("cuobjdump"), "--dump-resource-usage", built()).splitlines():
        if arch := re.fullmatch(r"arch = sm_(\d+)", line.strip()):
            kernels = found.setdefault(arch[1], {})
        elif function := re.match(r"\s*Function (\S+):", line):
            name = function[1]
        elif "REG:" in line:
            kernels[name] = {key: int(n) for key, n in re.findall(r"([A-Z]+):(\d+)", line)}
    return found


def needs(arch: str) -> None:
    built()
    if arch not in resources():
        pytest.skip(f"igpo._C was built for sm_{', sm_'.join(resources())} (IGPO_CUDA_ARCHS)")


def is_kernel(name: str, mangled: str) -> bool:
    """A mangled identifier has its length before it: no kernel is taken for one whose name ends the same."""
    return f"{len(name)}{name}" in mangled


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills(arch: str) -> None:
    needs(arch)
    kernels = resources()[arch]
    assert kernels
    for name, used in kernels.items():
        assert used["STACK"] == used["LOCAL"] == 0, f"{name} on sm_{arch}: {used}"


def wide_kernels(arch: str, name: str) -> list[str]:
    """The mangled instantiations of a kernel; of templates over the element type those of bfloat16."""
    own = [kernel for kernel in resources()[arch] if is_kernel(name, kernel)]
    return [kernel for kernel in own if "4Bf16" in kernel] or own


@pytest.mark.parametrize("arch", ARCHS)
def test_hot_loops_read_16_bytes_at_a_time(arch: str) -> None:
    needs(arch)
    wanted = {name: wide_kernels(arch, name) for name in WIDE}
    listed = ",".join(k for instantiations in wanted.values() for k in instantiations)
    sass = output(tool("cuobjdump"), "-sass", "-arch", f"sm_{arch}", "-fun", listed, built())
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", sass, re.DOTALL))
    for name, instantiations in wanted.items():
        assert instantiations, f"{name} is in WIDE and not in the module: correct the table"
        for kernel in instantiations:
            found = re.search(r"\bLDG(STS)?\.E[A-Z0-9_.]*\.128\b", code[kernel])
            assert found, f"{kernel} on sm_{arch}"


def test_module_says_why_its_kernels_cannot_run_here() -> None:
    """In a process of its own: here the rows may already run on the emulator."""
    built()
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    code = (
        "from igpo import _C; from igpo.ops import _native, __main__ as table; "
        "print(_C.cuda.device_count(), _native.cuda_why_not()); table.main()"
    )
    first, table = output(sys.executable, "-c", code).split("\n", 1)
    count, reason = first.split(" ", 1)
    assert count == "0"
    assert reason == "no CUDA device", reason
    for op in OPS.values():
        if "cuda" in {row.name for row in op.backends}:
            line = rf"^{op.name} +cuda +{re.escape(reason)}"
            assert re.search(line, table, re.MULTILINE), table
