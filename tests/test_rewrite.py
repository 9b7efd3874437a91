"""Rewriting traces: the rules, an endpoint on this machine that misbehaves, and a run that is killed and resumed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from igpo.cli import main
from igpo.config import DataConfig
from igpo.data import concise, problems

ROWS = 24
pytest.importorskip("openai")


class Endpoint(ThreadingHTTPServer):
    """Answers /v1/chat/completions. `misbehave`: number of the problem -> what to do at which of its requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[int] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.lock = threading.Lock()
        self.delay = 0.0
        self.misbehave: Callable[[int, int], str | int | None] = lambda number, time_: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        a, b = map(int, re.findall(r"Problem:\n(\d+) \+ (\d+) =", text)[0])
        with self.server.lock:
            self.server.asked[a] += 1
            self.server.bodies.append(body)
            self.server.keys.add(self.headers["Authorization"])
            odd = self.server.misbehave(a, self.server.asked[a])
        time.sleep(self.server.delay)
        if isinstance(odd, int):
            self._send(odd, {"error": {"message": f"status {odd}"}})
            return
        reply = f"{a} + {b} = {a + b}\n#### {a + b}" if odd is None else odd
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        message = {"role": "assistant", "content": reply}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        head = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        self._send(200, {**head, "choices": [choice], "usage": usage})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client was killed

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def words(problems: Path, tmp_path: Path, endpoint: Endpoint) -> list[str]:
    """The command, on ROWS additions."""
    rows = [
        {
            "question": f"{a} + 1 =",
            "answer": f"{a} + 1 = {a + 1} = {a + 1} #### {a + 1}",
            "level": a,
        }
        for a in range(ROWS)
    ]
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "rewrite", f"train_file={file}", f"tokenizer_name_or_path={problems}", "max_completion_length=32",
        f"output_file={tmp_path / 'out.jsonl'}", f"base_url={endpoint.url}", "rewrite_model=m", "concurrency=4",
        "prompt_price=2", "completion_price=10", "max_retries=2",
    ]  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_endpoint_that_misbehaves(words: list[str], endpoint: Endpoint, tmp_path: Path) -> None:
    def misbehave(number: int, time_: int) -> str | int | None:
        return {
            (0, 1): 429, (1, 1): 500, (1, 2): 503, (3, 1): "no idea\n#### 99",
            **{(2, n): "2 + 1 = 99 #### 99" for n in (1, 2)}, **{(4, n): "x " * 40 + "#### 5" for n in (1, 2)},
            **{(5, n): "" for n in (1, 2)},
        }.get((number, time_))  # fmt: skip

    endpoint.misbehave = misbehave
    assert main(words) == 0
    accepted, rejected = lines(tmp_path / "out.jsonl"), lines(tmp_path / "out.rejects.jsonl")
    assert [row["row"] for row in accepted] == [n for n in range(ROWS) if n not in (2, 4, 5)]
    reasons = {row["row"]: row["reason"] for row in rejected}
    assert reasons == {2: "wrong answer", 4: "too long: 43 tokens", 5: "empty"}
    assert [endpoint.asked[n] for n in range(7)] == [2, 3, 2, 2, 2, 2, 1]
    assert accepted[0] == {
        "answer": "0 + 1 = 1\n#### 1", "level": 0, "row": 0, "question": "0 + 1 =", "original_trace": "0 + 1 = 1 = 1"
    }  # fmt: skip
    assert rejected[0]["original_trace"] == "2 + 1 = 3 = 3"
    summary = json.loads((tmp_path / "out.json").read_text())
    replies = ROWS + 4  # one more for each of 2, 3, 4 and 5; errors are not paid for
    assert summary["numbers"]["prompt_tokens"] == 100 * replies
    assert summary["numbers"]["cost"] == pytest.approx(replies * (200 + 100) / 1e6)
    assert summary["reasons"]["accepted"] == ROWS - 3
    assert summary["numbers"]["mean_tokens_before"] > summary["numbers"]["mean_tokens_after"]
    assert (tmp_path / "out.png").stat().st_size > 1000
    assert "at most 32 tokens" in endpoint.bodies[0]["messages"][0]["content"]
    found = list(problems(str(tmp_path / "out.jsonl"), DataConfig()))
    assert (found[0].solution, found[0].answer) == ("0 + 1 = 1", "1")


def test_a_killed_run_goes_on_with_nothing_lost_or_done_twice(
    words: list[str], endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.delay = 0.2
    journal = tmp_path / "out.journal.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "igpo", *words], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while time.monotonic() < end and (not journal.exists() or len(lines_kept(journal)) < 8):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {line["row"] for line in lines_kept(journal)}
    assert 7 <= len(done) < ROWS
    assert not (tmp_path / "out.jsonl").exists()
    with journal.open("a") as stream:
        stream.write('{"row": 23, "rea')  # what a kill in the middle of a write leaves
    time.sleep(0.5)  # requests of the killed run are answered
    before = Counter(endpoint.asked)
    endpoint.delay = 0.0
    assert main(words) == 0
    assert [row["row"] for row in lines(tmp_path / "out.jsonl")] == list(range(ROWS))
    assert sorted(line["row"] for line in lines_kept(journal)) == list(range(ROWS))
    asked = endpoint.asked - before
    assert set(asked) == set(range(ROWS)) - done
    assert set(asked.values()) == {1}
    summary = json.loads((tmp_path / "out.json").read_text())
    assert summary["numbers"]["prompt_tokens"] == 100 * ROWS
    assert main(words) == 0  # nothing is left to do
    assert endpoint.asked - before == asked


def lines_kept(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().split("\n")[1:-1]]


def test_what_stays_broken_is_left_for_the_next_run(
    words: list[str], endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.misbehave = lambda number, _: 500 if number == 3 else None
    assert main(words) == 1
    assert "1 of 24 requests failed" in capsys.readouterr().err
    assert len(lines(tmp_path / "out.jsonl")) == ROWS - 1
    endpoint.misbehave = lambda *_: None
    assert main(words) == 0
    assert [row["row"] for row in lines(tmp_path / "out.jsonl")] == list(range(ROWS))


def test_a_refusal_stops_at_once(
    words: list[str], endpoint: Endpoint, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("MY_KEY", "secret")
    endpoint.misbehave = lambda *_: 401
    assert main([*words, "api_key_env=MY_KEY"]) == 1
    said = capsys.readouterr().err
    assert "status 401" in said
    assert "secret" not in said
    assert endpoint.keys == {"Bearer secret"}
    assert endpoint.asked.total() <= 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["rewrite_model=none"], "base_url and rewrite_model must both be set"),
        (["concurrency=0"], "concurrency must be at least 1, got 0"),
        (["prompt_price=-1"], "prompt_price must not be negative, got -1.0"),
        (["train_file=none"], "train_file must name the problems to rewrite, got none"),
    ],
)
def test_options_that_cannot_be_meant(
    words: list[str], changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *changes]) == 2
    assert message in capsys.readouterr().err


def test_a_journal_of_other_settings_is_not_continued(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "limit=2"]) == 0
    assert main([*words, "max_trace_length=20"]) == 2
    assert "belongs to a run with other settings" in capsys.readouterr().err


def test_without_a_model(words: list[str], endpoint: Endpoint, tmp_path: Path) -> None:
    assert main([*words, "base_url=none", "rewrite_model=none", "max_trace_length=12"]) == 0
    assert len(lines(tmp_path / "out.jsonl")) == ROWS
    assert not endpoint.asked


@pytest.mark.parametrize(
    ("solution", "short"),
    [
        ("Let's think. So, she has 3+4 = <<3+4=7>>7 pens.", "She has 3+4 = 7 pens."),
        ("She has 3 pens. She buys 4 pens. 3 + 4 = 7.", "3 + 4 = 7."),
        ("First, 3 + 4 = 7.\nFirst, 3 + 4 = 7.\nThus, 7 pens.", "3 + 4 = 7.\n7 pens."),
        ("We need to find the sum. Wait, let me see. It is 7.", "It is 7."),
        ("She has 3 pens.", "She has 3 pens."),  # the last sentence stays
        ("Half of them is 2. So 2 + 1 = 3.", "Half of them is 2.\n2 + 1 = 3."),  # a new number
    ],
)
def test_the_rules_without_a_model(solution: str, short: str) -> None:
    question = "She has 3 pens. She buys 4 pens. How many?"
    assert concise(solution, question) == short
    assert concise(short, question) == short


def test_gsm8k_keeps_every_answer(shared: Path) -> None:
    from igpo.rewards import has_answer

    before = after = 0
    for problem in problems(f"gsm8k={shared / 'data/gsm8k/train.jsonl'}", DataConfig(), 1500):
        assert problem.solution is not None
        assert problem.answer is not None
        text = concise(problem.solution, problem.question)
        before, after = before + len(problem.solution), after + len(text)
        assert has_answer(f"{text}\n#### {problem.answer}", problem.answer)
        kept = re.findall(r"[0-9.]+", text)
        assert not re.search(r"=\s*[0-9]", problem.solution) or kept
    assert after < before
