"""`igpo eval` killed, resumed, shared by processes: the same bytes as one that ran through, and nothing done twice."""

from __future__ import annotations

import functools
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from public_folders import llada_folder

from igpo import evaluate as program
from igpo import evaluation_tasks
from igpo.cli import COMMANDS, main, parse
from igpo.config import Config, ConfigError
from igpo.config_io import dump
from igpo.data import rows
from igpo.data.sources import DataError, Source
from igpo.evaluation_tasks import TASKS
from igpo.options import EvalOptions
from igpo.shards import Shard

SAMPLES, LENGTHS = 2, (4, 8)
ALL = 10 * SAMPLES * len(LENGTHS)  # completions of `problems`


@pytest.fixture
def evaluation(trained: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    """evaluation("folder", …): ten problems, two samples each, two lengths, three completions at a time."""
    file = trained().data.train_file
    settings = (
        f"eval_file={file}", f"num_eval_generations={SAMPLES}", "eval_temperature=1", "eval_lengths=4,8",
        "eval_batch_size=3",
    )  # fmt: skip
    return lambda name, *more: trained(f"output_dir={tmp_path / name}", *settings, *more)


@pytest.fixture
def denoised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Canvases denoised, call by call."""
    counts: list[int] = []
    original = program.denoise

    def counted(policy, canvas, *rest, **named):
        counts.append(len(canvas.tokens))
        return original(policy, canvas, *rest, **named)

    monkeypatch.setattr(program, "denoise", counted)
    return counts


def files(cfg: Config) -> tuple[bytes, dict]:
    """Predictions, and the numbers and protocol of evaluation.json."""
    folder = Path(cfg.train.output_dir)
    record = json.loads((folder / "evaluation.json").read_text())
    return (folder / "predictions.jsonl").read_bytes(), record | {"predictions": None}


def run(cfg: Config, index: int | None = None, count: int | None = None) -> dict:
    return dict(program.run(cfg, EvalOptions(shard_index=index, num_shards=count)))


def test_a_killed_run_goes_on_where_it_stopped(
    evaluation: Callable[..., Config], tmp_path: Path, denoised: list[int]
) -> None:
    """SIGKILL in the middle, in another process; then half a line at the end, as a power cut leaves it."""
    whole, killed = evaluation("whole"), evaluation("killed")
    run(whole)
    assert sum(denoised) == ALL
    config = tmp_path / "eval.yaml"
    config.write_text(dump(killed), encoding="utf-8")
    slow = (
        "import time, igpo.evaluate as e; d = e.denoise\n"
        "e.denoise = lambda *a, **k: (time.sleep(0.2), d(*a, **k))[1]\n"
        f"from igpo.cli import main; main(['eval', {str(config)!r}])"
    )
    child = subprocess.Popen([sys.executable, "-c", slow], env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    file = Path(killed.train.output_dir) / "predictions.jsonl"
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and (not file.exists() or file.read_bytes().count(b"\n") < 6):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = file.read_bytes()
    done = kept.count(b"\n")
    assert 6 <= done < ALL
    file.write_bytes(kept + b'{"row": 9, "sam')
    denoised.clear()
    run(killed)
    assert sum(denoised) == ALL - done
    assert file.read_bytes().startswith(kept)
    assert files(killed) == files(whole)


def test_a_problem_cut_in_half_is_completed(
    evaluation: Callable[..., Config], denoised: list[int]
) -> None:
    cfg = evaluation("run")
    numbers = run(cfg)
    before = files(cfg)
    file = Path(cfg.train.output_dir) / "predictions.jsonl"
    lines = before[0].splitlines(True)
    file.write_bytes(b"".join(lines[:5]))  # the third problem has one of its two samples
    denoised.clear()
    assert run(cfg) == numbers
    assert sum(denoised) == ALL - 5
    assert files(cfg) == before
    denoised.clear()
    assert run(cfg) == numbers  # complete: the report alone
    assert denoised == []


def test_interrupting_keeps_what_is_done(
    evaluation: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    cfg, original = evaluation("run"), program.denoise
    calls = iter(range(3))

    def interrupted(*arguments, **named):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(program, "denoise", interrupted)
    config = tmp_path / "eval.yaml"
    config.write_text(dump(cfg), encoding="utf-8")
    assert main(["eval", str(config)]) == 130
    assert "the same command goes on from" in capsys.readouterr().err
    file = Path(cfg.train.output_dir) / "predictions.jsonl"
    assert file.read_bytes().count(b"\n") == 6


def test_shards_are_one_evaluation(
    evaluation: Callable[..., Config], denoised: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, shared = evaluation("whole"), evaluation("shared")
    numbers = run(whole)
    denoised.clear()
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    assert run(shared) == {}  # as torchrun numbers it
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert run(shared, 0, 3) == {}
    assert not (Path(shared.train.output_dir) / "evaluation.json").exists()
    assert run(shared, 1, 3) == numbers
    assert sum(denoised) == ALL
    assert files(shared) == files(whole)
    names = {path.name for path in Path(shared.train.output_dir).glob("predictions-*.jsonl")}
    assert names == {f"predictions-0000{i}-of-00003.jsonl" for i in range(3)}


def test_another_number_of_processes_goes_on(
    evaluation: Callable[..., Config], denoised: list[int]
) -> None:
    whole, shared = evaluation("whole"), evaluation("shared")
    run(whole)
    run(shared, 1, 3)
    denoised.clear()
    assert run(shared, 0, 2) == {}
    assert run(shared) != {}
    assert sum(denoised) == ALL - 3 * SAMPLES * len(LENGTHS)
    assert files(shared) == files(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("eval_temperature=0.5", "temperature is 1.0 there, 0.5 here"),
        ("train.seed=4", "seed is 3 there, 4 here"),
        ("eval_lengths=8", r"max_completion_length is \[4, 8\] there, \[8\] here; diffusion_steps"),
        ("reward.task=gsm8k", "task is 'answer' there, 'gsm8k' here"),
        ("eval_limit=3", "prompts is '.*' there, '.*' here; num_problems is 10 there, 3 here"),
        ("top_k=2", "top_k is 0 there, 2 here"),
    ],
)
def test_another_protocol_is_refused(
    evaluation: Callable[..., Config], change: str, message: str
) -> None:
    run(evaluation("run"), 0, 3)
    with pytest.raises(ConfigError, match=f"holds completions of another protocol: {message}"):
        run(evaluation("run", change))


def test_other_weights_are_another_protocol(
    evaluation: Callable[..., Config], trained: Callable[..., Config]
) -> None:
    cfg = evaluation("run")
    run(cfg)
    run(evaluation("run", "eval_batch_size=64", "verify_workers=1"))  # changes no completion
    file = Path(cfg.model.model_name_or_path or "") / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=r"model is '[0-9a-f]+' there, '[0-9a-f]+' here"):
        run(cfg)


def test_predictions_nobody_described_are_refused(evaluation: Callable[..., Config]) -> None:
    cfg = evaluation("run")
    folder = Path(cfg.train.output_dir)
    folder.mkdir()
    (folder / "predictions.jsonl").write_text('{"row": 0}\n')
    with pytest.raises(ConfigError, match=r"there is no predictions\.protocol\.json"):
        run(cfg)


def test_two_processes_never_write_one_file(evaluation: Callable[..., Config]) -> None:
    import fcntl

    cfg = evaluation("run")
    run(cfg)
    with (Path(cfg.train.output_dir) / "predictions.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is writing it"):
            run(cfg)


@pytest.mark.parametrize(("index", "count"), [(3, 3), (-1, 2), (None, 2), (0, None), (0, 0)])
def test_shards_must_exist(index: int | None, count: int | None) -> None:
    message = rf"shard_index must be in \[0, num_shards\).*{index} of {count}"
    with pytest.raises(ConfigError, match=message):
        Shard.of(EvalOptions(shard_index=index, num_shards=count), {})


# --- published tasks


def parsed(*words: str) -> Config:
    return parse(COMMANDS["eval"], words)[0]


def test_a_task_is_a_whole_protocol(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(dump(parsed("temperature=0.7", "threshold=0.9", "dtype=bfloat16")))
    words = ("--model", "M", "--task", "math500", "--length", "128,512", "block_length=64")
    cfg = parsed(str(config), *words)
    assert (cfg.model.model_name_or_path, cfg.model.dtype) == ("M", "bfloat16")
    assert (cfg.data.eval_file, cfg.data.prompt_template) == ("math500", "d1")
    assert (cfg.rollout.temperature, cfg.rollout.threshold) == (0.0, None)
    assert cfg.rollout.block_length == 64  # the command line has the last word
    assert (cfg.evaluation.eval_lengths, cfg.evaluation.eval_temperature) == ((128, 512), 0.0)
    assert cfg.reward.task == "math"
    steps = [program.at_length(cfg, n).rollout.diffusion_steps for n in (128, 512)]
    assert steps == [64, 256]
    assert parsed("--task", "gsm8k").evaluation.eval_lengths == (128, 256, 512)
    amc = parsed("task=amc23").evaluation
    assert (amc.eval_temperature, amc.num_eval_generations) == (0.1, 16)
    assert parsed("reward.task=math").data.eval_file is None
    with pytest.raises(
        ConfigError, match=r"task must be one of gsm8k, .* got 'math', the nearest is 'math500'"
    ):
        parsed("task=math")


@pytest.mark.parametrize("task", TASKS)
def test_tasks_run_on_the_real_problems(task: str, tmp_path: Path, shared: Path) -> None:
    """A random model of LLaDA's form and copies of the data; the canvas and the number of problems are smaller."""
    place = shared / "data" / task / ("test.csv" if task == "sudoku" else "test.jsonl")
    folder = llada_folder(tmp_path / "llada")
    words = (
        "eval", "--model", str(folder), "--task", task, "--length", "32", f"--eval_file={task}={place}",
        "eval_limit=1", "max_prompt_length=2000", "diffusion_steps=16", "max_completion_length=32", "device=cpu",
        f"output_dir={tmp_path / 'out'}", "eval_batch_size=8",
    )  # fmt: skip
    assert main(words) == 0
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    samples = 16 if task == "amc23" else 1
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == samples
    assert record["metrics"]["num_problems"] == 1
    facts = record["protocol"]
    assert facts["first_prompt"].endswith("<|end_header_id|>\n\n<reasoning>")
    assert (facts["block_length"], facts["remasking"]) == (32, "low_confidence")
    assert facts["task"] == TASKS[task]["reward"]["task"]
    assert len(facts["stop_token_ids"]) == 2


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of tmp_path."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


def test_a_file_may_be_a_url(server: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Puzzle,Solution\n0123,4123\n")
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    assert [r.record for r in rows(Source(f"{server}/a.csv"))] == [
        {"Puzzle": "0123", "Solution": "4123"}
    ]
    source = Source.parse(f"{server}/a.jsonl")
    assert [r.record for r in rows(source)] == [{"x": 1}]
    with pytest.raises(DataError, match=r"b\.jsonl: File not found\."):
        list(rows(Source(f"{server}/b.jsonl")))


def test_the_documentation_lists_every_task() -> None:
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for name in TASKS:
        assert f"| `{name}` |" in text
    assert evaluation_tasks.settings(EvalOptions()) == []
