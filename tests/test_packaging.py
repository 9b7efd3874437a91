"""What a user gets: a light import, one entry point, a wheel that carries everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "transformers",
    "tokenizers",
    "safetensors",
    "rich",
    "tyro",
    "yaml",
    "peft",
    "matplotlib",
    "tensorboard",
)


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_ops_need_torch_and_numpy_only() -> None:
    block = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))"  # importing any of them raises
    )
    out = run(f"{block}; import igpo.ops; print(len(igpo.ops.OPS))")
    assert int(out) >= 1


def test_import_does_not_initialise_cuda_or_touch_global_seeds() -> None:
    code = (
        "import torch; s = torch.initial_seed(); import igpo.ops; print(torch.initial_seed() == s)"
    )
    assert run(code).strip() == "True"
    assert run("import torch, igpo.ops; print(torch.cuda.is_initialized())").strip() == "False"


def test_table_of_backends_lists_every_op() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "igpo.ops"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    from igpo.ops import OPS

    for name in OPS:
        rows = [line.split() for line in out.splitlines() if line.startswith(name + " ")]
        assert {"cpu", "reference"} <= {row[1] for row in rows}, f"{name}: {rows}"
        assert all(row[2:4] == ["runs", "here"] for row in rows if row[1] in ("cpu", "reference"))


def test_wheel_metadata_lists_packages_that_exist() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for package in settings["tool"]["setuptools"]["packages"]:
        folder = "kernels/gpu" if package == "igpo.kernels" else package.replace(".", "/")
        assert (ROOT / folder / "__init__.py").exists(), package
    found = {
        p.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for p in (ROOT / "igpo").rglob("__init__.py")
    }
    assert found <= set(settings["tool"]["setuptools"]["packages"]), (
        "a package is missing from pyproject.toml"
    )


def test_build_of_cuda_without_nvcc_says_where_it_looked(tmp_path: Path) -> None:
    code = (
        "import os, shutil; os.access = lambda *a: False; shutil.which = lambda *a, **k: None; "
        "os.environ.update(IGPO_BUILD='cuda', CUDA_HOME='/nowhere'); import sys; sys.argv = ['setup.py', '--version']; "
        "import importlib.util as u; s = u.spec_from_file_location('s', 'setup.py'); m = u.module_from_spec(s); "
        "s.loader.exec_module(m); m.choose()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "IGPO_BUILD=cuda, but there is no nvcc in: /nowhere/bin/nvcc, " in done.stderr
