"""Builds igpo._C: C++ CPU kernels always, CUDA kernels when nvcc is found. No torch headers are used.

IGPO_BUILD=auto|cpu|cuda   what to build (auto: cuda when nvcc is found)
IGPO_CUDA_ARCHS=80,90,100  GPU architectures; code for each, PTX for the newest
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
ONCE = {
    "bindings.cpp",
    "isa.cpp",
    "parallel.cpp",
}  # every other csrc/*.cpp is built per instruction set
ISAS = {"portable": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = "-mavx2 -mfma -mf16c"
    ISAS["avx512"] = (
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
    )
CPU = sorted((ROOT / "csrc").glob("*.cpp"))
CUDA = sorted((ROOT / "kernels/gpu").glob("*.cu"))
HEADERS = sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "kernels/gpu").glob("*.cuh")])


def find_nvcc():
    homes = [os.environ[k] for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k)]
    tried = [os.environ.get("CUDACXX", ""), *(f"{h}/bin/nvcc" for h in [*homes, "/usr/local/cuda"])]
    for path in tried:
        if path and os.access(path, os.X_OK):
            return path, tried
    return shutil.which("nvcc"), [*filter(None, tried), "PATH"]


def choose():
    """The nvcc to build with or None, and the sentence that says why."""
    wanted = os.environ.get("IGPO_BUILD", "auto")
    if wanted not in ("auto", "cpu", "cuda"):
        sys.exit(f"igpo: IGPO_BUILD must be auto, cpu or cuda, got {wanted!r}.")
    nvcc, tried = find_nvcc()
    if wanted == "cpu":
        return None, "CPU kernels only (IGPO_BUILD=cpu)"
    if nvcc is None and wanted == "cuda":
        sys.exit(
            f"igpo: IGPO_BUILD=cuda, but there is no nvcc in: {', '.join(tried)}. Set CUDA_HOME."
        )
    if nvcc is None:
        return None, f"CPU kernels only (no nvcc in: {', '.join(tried)})"
    return nvcc, f"CPU and CUDA kernels for sm_{', sm_'.join(archs())} (nvcc: {nvcc})"


def archs():
    found = os.environ.get("IGPO_CUDA_ARCHS", "80,90,100").replace(";", ",").replace(".", "")
    return [a.strip().removeprefix("sm_") for a in found.split(",") if a.strip()]


def build_id():
    """Changes with the sources, so that igpo.ops can refuse a stale igpo._C (igpo/ops/_native.py)."""
    digest = hashlib.sha256()
    for path in [*CPU, *CUDA, *HEADERS]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def ninja_file(nvcc, output, temp):
    include = f"-I{ROOT}/csrc -I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
    gencode = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs())
    newest = archs()[-1]
    common = f"-DIGPO_HAS_CUDA={int(bool(nvcc))} {include}"
    warn = "-Wall -Wextra -Wno-psabi -Wno-ignored-attributes"
    lines = [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        f"flags = -std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math {warn} {common}",
        "rule cpp\n  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule cu\n  command = {nvcc} -std=c++17 -O3 -lineinfo -Xcompiler -fPIC,-fvisibility=hidden {gencode} "
        f"-gencode arch=compute_{newest},code=compute_{newest} {common} -MD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc",
    ]
    cuda_lib = f"-L{Path(nvcc).resolve().parent.parent}/lib64 -lcudart_static -lrt" if nvcc else ""
    shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared -Wl,-s"
    lines.append(f"rule link\n  command = $cxx {shared} $in -o $out -ldl -lpthread {cuda_lib}")
    objects = []

    def edge(rule, source, name, extra=""):
        objects.append(f"{temp}/{name}.o")
        lines.append(f"build {objects[-1]}: {rule} {source}\n  extra = {extra}")

    for source in CPU:
        if source.name in ONCE:
            stamp = f'-DIGPO_BUILD_ID=\\"{build_id()}\\"' if source.name == "bindings.cpp" else ""
            edge("cpp", source, source.stem, stamp)
        else:
            for isa, flags in ISAS.items():
                edge("cpp", source, f"{source.stem}.{isa}", f"-DIGPO_ISA={isa} {flags}")
    for source in CUDA if nvcc else []:
        edge("cu", source, f"{source.stem}.cuda")
    lines.append(f"build {output}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class BuildNative(build_ext):
    def build_extension(self, ext):
        nvcc, reason = choose()
        print(f"igpo: building {reason}", flush=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        temp = Path(self.build_temp).resolve()
        for folder in (output.parent, temp):
            folder.mkdir(parents=True, exist_ok=True)
        (temp / "build.ninja").write_text(ninja_file(nvcc, output, temp))
        subprocess.run([os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(temp)], check=True)


setup(
    packages=[
        "igpo",
        "igpo.ops",
        "igpo.models",
        "igpo.rl",
        "igpo.rewards",
        "igpo.demo",
        "igpo.kernels",
    ],
    package_dir={"igpo.kernels": "kernels/gpu"},
    package_data={
        "igpo": ["py.typed", "demo/*.safetensors", "demo/*.json"],
        "igpo.kernels": ["*.cu", "*.cuh"],
    },
    ext_modules=[
        Extension(
            "igpo._C", [], depends=[str(p.relative_to(ROOT)) for p in [*CPU, *CUDA, *HEADERS]]
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
