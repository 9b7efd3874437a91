"""Builds the CUDA sources for the CPU emulator: one Python module, rebuilt when a source changes."""

from __future__ import annotations

import fcntl
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import ninja
import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / "build" / f"emulated-{sys.implementation.cache_tag}"
# no contraction: products and sums round one by one, as the kernels ask for where it matters
FLAGS = (
    "-x c++ -std=c++17 -O2 -g1 -fPIC -ffp-contract=off -fno-strict-aliasing -DIGPO_EMULATE -DIGPO_HAS_CUDA=1 "
    "-Wall -Wno-unknown-pragmas -Wno-unused"
)


def sources() -> list[Path]:
    kernels = [p for p in sorted((ROOT / "kernels/gpu").glob("*.cu")) if p.stem != "device"]
    return [HERE / "bindings.cpp", ROOT / "csrc/cuda_bindings.cpp", *kernels]


def ninja_file(module: Path) -> str:
    folders = (HERE, ROOT / "csrc", ROOT / "kernels/gpu", pybind11.get_include())
    include = " ".join(f"-I{path}" for path in (*folders, sysconfig.get_path("include")))
    text = f"""\
rule cpp
  command = c++ {FLAGS} {include} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = c++ -shared $in -o $out
"""
    objects = []
    for source in sources():
        objects.append(f"{source.stem}.o")
        text += f"build {objects[-1]}: cpp {source}\n"
    return text + f"build {module.name}: link {' '.join(objects)}\n"


def load() -> ModuleType:
    """The module, built first where needed; one process builds at a time."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    module = OUTPUT / f"igpo_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    with (OUTPUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (OUTPUT / "build.ninja").write_text(ninja_file(module))
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(OUTPUT)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"the CUDA sources do not compile for the emulator:\n{done.stdout[-4000:]}"
            )
    spec = importlib.util.spec_from_file_location("igpo_emulated", module)
    assert spec
    assert spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
