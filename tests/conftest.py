"""Fixtures every test can use. Backends are fixtures, not loops: each shows up in a test's id."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if os.environ.get("IGPO_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when igpo.ops and triton are imported

from igpo import config_io
from igpo.config import Config
from igpo.ops import OPS, _native, use_backend

from gpu import DEVICE, on_backend

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("IGPO_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shared() -> Path:
    """Real data and parity fixtures beside the project; they are not part of it."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}")
    return SHARED


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """bench("compare") -> the module benchmarks/compare.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:  # their names are too common to stay
        if str(ROOT / "benchmarks") in (getattr(sys.modules[name], "__file__", "") or ""):
            del sys.modules[name]


@pytest.fixture
def device() -> torch.device:
    """Where GPU backends are tested: IGPO_TEST_DEVICE, or the CPU by way of Triton's interpreter and the emulator."""
    return DEVICE


@pytest.fixture(params=["reference", "cpu", "triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per backend of the op its file is about, forced, with tensors made where it runs."""
    with on_backend(request.param, request.path.stem.removeprefix("test_")):
        yield request.param


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same for the GPU backends alone."""
    with on_backend(request.param, request.path.stem.removeprefix("test_")):
        yield request.param


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set this processor has, on the cpu backend."""
    native = _native.module()
    before = native.isa()
    try:
        native.set_isa(request.param)
    except ValueError as reason:
        pytest.skip(str(reason))
    with use_backend("cpu"):
        yield request.param
    native.set_isa(before)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def ran():
    """ran("merge_hints") -> the backend the op's last call really used."""
    return lambda op: OPS[op].chosen[0]


@pytest.fixture(scope="session")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer (one token a word) and problems.jsonl: additions with a worked solution."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<mask>", "<eos>", "+", "=", "####", *map(str, range(19))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    folder = tmp_path_factory.mktemp("problems")
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", mask_token="<mask>", eos_token="<eos>"
    ).save_pretrained(folder)
    sums = [(a, (7 * a + 3) % 10) for a in range(10)]
    rows = [
        {"question": f"{a} + {b} =", "answer": f"{a} + {b} = {a + b} #### {a + b}"} for a, b in sums
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def tiny(problems: Path, tmp_path: Path) -> Callable[..., Config]:
    """tiny("beta=0", …): a configuration that trains a very small decoder on `problems`, in tmp_path/run."""

    def make(*overrides: str) -> Config:
        settings = (
            f"tokenizer_name_or_path={problems}", f"train_file={problems / 'problems.jsonl'}",
            f"output_dir={tmp_path / 'run'}", "report_to=none", "device=cpu",
            "hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=32",
            "max_completion_length=8", "block_length=4", "diffusion_steps=4",
            "prompts_per_step=2", "num_generations=4", "num_iterations=2", "max_steps=4",
            "per_device_train_batch_size=3", "learning_rate=1e-2", "warmup_steps=2",
        )  # fmt: skip
        return config_io.load([], [*settings, *overrides])

    return make


@pytest.fixture
def trained(tiny: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    """As tiny, with a saved model: what can be evaluated and asked."""
    from igpo.policy import build_policy, load_tokenizer

    cfg = tiny()
    tokenizer = load_tokenizer(cfg.model)
    for part in (build_policy(cfg, tokenizer), tokenizer):
        part.save_pretrained(tmp_path / "model")
    return lambda *overrides: tiny(f"model_name_or_path={tmp_path / 'model'}", *overrides)
