"""Builds igpo._C: C++ CPU kernels always, CUDA kernels when nvcc is found. No torch headers are used.

IGPO_BUILD=auto|cpu|cuda   what to build (auto: cuda when nvcc is found)
IGPO_CUDA_ARCHS=80,90,100  GPU architectures: code for each, PTX for the last
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
GPU = ROOT / "kernels/gpu"
CPU, CUDA = sorted((ROOT / "csrc").glob("*.cpp")), sorted(GPU.glob("*.cu"))
SOURCES = [*CPU, *CUDA, *sorted([*(ROOT / "csrc").glob("*.h"), *GPU.glob("*.cuh")])]
SHIPPED = [str(p.relative_to(ROOT)) for p in [*SOURCES, ROOT / "csrc/rules.ninja"]]
BINDINGS = {"bindings", "cuda_bindings"}
ONCE = {*BINDINGS, "isa", "parallel"}  # every other csrc/*.cpp is built per instruction set
ISAS = {"portable": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = "-mavx2 -mfma -mf16c"
    ISAS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"


def find_nvcc():
    homes = [os.environ[k] for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k)]
    tried = [os.environ.get("CUDACXX"), *(f"{h}/bin/nvcc" for h in [*homes, "/usr/local/cuda"])]
    tried = [path for path in tried if path]
    found = next((path for path in tried if os.access(path, os.X_OK)), shutil.which("nvcc"))
    return found, ", ".join([*tried, "PATH"])


def choose():
    """The nvcc to build with or None, and the sentence that says why."""
    wanted = os.environ.get("IGPO_BUILD", "auto")
    if wanted not in ("auto", "cpu", "cuda"):
        sys.exit(f"igpo: IGPO_BUILD must be auto, cpu or cuda, got {wanted!r}.")
    nvcc, tried = find_nvcc()
    if wanted == "cpu":
        return None, "CPU kernels only (IGPO_BUILD=cpu)"
    if nvcc is None and wanted == "cuda":
        sys.exit(f"igpo: IGPO_BUILD=cuda, but there is no nvcc in: {tried}. Set CUDA_HOME.")
    if nvcc is None:
        return None, f"CPU kernels only (no nvcc in: {tried})"
    return nvcc, f"CPU and CUDA kernels for sm_{', sm_'.join(archs())} (nvcc: {nvcc})"


def archs():
    named = os.environ.get("IGPO_CUDA_ARCHS", "80,90,100").replace(";", ",").replace(".", "")
    return [arch.strip().removeprefix("sm_") for arch in named.split(",") if arch.strip()]


def build_id():
    """Changes with the sources, so that igpo.ops can refuse a stale igpo._C (ops/_native.py)."""
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in SOURCES)).hexdigest()[
        :12
    ]


def edges(nvcc):
    """(object, rule, source, extra flags) of everything to compile."""
    stamp = rf"-DIGPO_HAS_CUDA={int(bool(nvcc))} -DIGPO_BUILD_ID=\"{build_id()}\""
    for source in CPU:
        if source.stem in ONCE:
            yield source.stem, "cpp", source, stamp if source.stem in BINDINGS else ""
            continue
        for isa, flags in ISAS.items():
            yield f"{source.stem}.{isa}", "cpp", source, f"-DIGPO_ISA={isa} {flags}"
    for source in CUDA if nvcc else []:
        yield f"{source.stem}.cuda", "cu", source, ""


def ninja_file(nvcc, output, temp):
    codes = [f"arch=compute_{a},code=sm_{a}" for a in archs()]
    codes += [f"arch=compute_{archs()[-1]},code=compute_{archs()[-1]}"]
    lib64 = Path(nvcc).resolve().parents[1] / "lib64" if nvcc else None
    text = f"""\
header_paths = -I{ROOT}/csrc -I{pybind11.get_include()} -I{sysconfig.get_path("include")}
cxx = {os.environ.get("CXX", "c++")}
nvcc = {nvcc}
gencode = {" ".join(f"-gencode {code}" for code in codes)}
shared = {"-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared -Wl,-s"}
cuda_libraries = {f"-L{lib64} -lcudart_static -lrt" if nvcc else ""}
include {ROOT}/csrc/rules.ninja
"""
    objects = []
    for name, rule, source, extra in edges(nvcc):
        objects.append(f"{temp}/{name}.o")
        text += f"build {objects[-1]}: {rule} {source}\n  extra = {extra}\n"
    return text + f"build {output}: link {' '.join(objects)}\n"


class BuildNative(build_ext):
    def build_extension(self, ext):
        nvcc, reason = choose()
        print(f"igpo: building {reason}", flush=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        temp = (
            ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        )  # kept: builds are incremental
        for folder in (output.parent, temp):
            folder.mkdir(parents=True, exist_ok=True)
        (temp / "build.ninja").write_text(ninja_file(nvcc, output, temp))
        subprocess.run([os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(temp)], check=True)


setup(
    ext_modules=[Extension("igpo._C", [], depends=SHIPPED)],
    cmdclass={"build_ext": BuildNative},
)
