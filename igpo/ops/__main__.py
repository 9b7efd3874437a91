"""`python -m igpo.ops`: which backend of which op runs on this machine, or why not."""

from __future__ import annotations

import sys

import torch

import igpo

from . import OPS, _checked, _native
from ._dispatch import Op


def rows(op: Op) -> list[tuple[str, str, str, str]]:
    """(op, backend, "runs here" or the reason, where it was checked), one per backend."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    out = []
    for row in op.backends:
        reason = row.unavailable()
        if reason is None and not set(devices) & set(row.devices):
            reason = f"no {' or '.join(row.devices)} device"
        checked = row.checked or _checked.places(op.name, row.name)
        out.append((op.name, row.name, reason or "runs here", checked))
    return out


def header() -> str:
    native = _native.why_not()
    module = native or (
        f"igpo._C build {_native.module().build_id}, {_native.module().isa()}, "
        f"threads: {_native.module().thread_runtime()} x {torch.get_num_threads()}"
    )
    return f"igpo {igpo.__version__}, torch {torch.__version__}; {module}"


def main() -> None:
    table = [("op", "backend", "here", "checked on")]
    for _, op in sorted(OPS.items()):
        table += rows(op)
    widths = [max(len(line[i]) for line in table) for i in range(4)]
    cells = (zip(line, widths, strict=True) for line in table)
    lines = ("  ".join(cell.ljust(width) for cell, width in line).rstrip() for line in cells)
    sys.stdout.write("\n".join([header(), *lines]) + "\n")


if __name__ == "__main__":
    main()
