"""Verification that no completion can stop: every judgement runs in a worker process with a bound on its time."""

from __future__ import annotations

import atexit
import logging
import os
import select
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

from .sandbox import Limits, SandboxError
from .tasks import check
from .verdict import ReferenceValueError, Verdict
from .worker import receive, send

logger = logging.getLogger(__name__)

STARTUP_S = 120.0  # for an interpreter and the libraries of a task on a busy machine; chosen


class VerifierError(RuntimeError):
    """A worker process could not start or answer; no fault of a completion."""


@dataclass(frozen=True)
class _Job:
    task: str
    completion: str
    reference: Any
    compat: str | None


class VerifierPool:
    """Worker processes that judge completions. A context manager; `close` ends the processes.

        with VerifierPool(num_workers=4, timeout_s=5) as pool:
            verdicts = pool.verify("math", completions, references)

    Processes start with the first jobs, as fresh interpreters (nothing is forked, so threads and CUDA do not matter,
    and scripts need no `if __name__` guard). A completion that takes longer than timeout_s, or kills its worker, gets a
    Verdict whose failure says so; the worker is killed with everything it started and replaced.

    Args:
        num_workers: processes, and completions judged at once.
        timeout_s: wall-clock seconds for one completion, from when its task's libraries are loaded.
        memory_gib: address space of a worker. Programs of task "code" get limits of their own (`sandbox.Limits`), with
            three quarters of timeout_s.
    Raises:
        ValueError: a number that is not positive.
    """

    def __init__(
        self, num_workers: int = 2, timeout_s: float = 10.0, memory_gib: float = 4.0
    ) -> None:
        for key, value in (
            ("num_workers", num_workers), ("timeout_s", timeout_s), ("memory_gib", memory_gib)
        ):  # fmt: skip
            if not value > 0:
                raise ValueError(f"VerifierPool: {key} must be positive, got {value}.")
        self.timeout_s, self.memory_bytes = timeout_s, int(memory_gib * (1 << 30))
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(num_workers, "igpo-verify")
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._all: set[_Worker] = set()
        self.closed = False

    def verify(
        self, task: str, completions: Sequence[str], references: Sequence[Any], compat: str | None = None
    ) -> list[Verdict]:  # fmt: skip
        """A verdict per completion, in order. Raises as `igpo.rewards.verify`."""
        if len(completions) != len(references):
            raise ValueError(
                f"verify: completions and references must have one length, got {len(completions)} and "
                f"{len(references)}."
            )
        futures = [
            self.submit(task, completion, reference, compat)
            for completion, reference in zip(completions, references, strict=True)
        ]
        return [future.result() for future in futures]

    def submit(
        self, task: str, completion: str, reference: Any, compat: str | None = None
    ) -> Future[Verdict]:
        """The same for one completion, without waiting: `await asyncio.wrap_future(pool.submit(…))`."""
        check(task, compat)
        if not isinstance(completion, str):
            raise TypeError(f"verify: a completion must be text, got {type(completion).__name__}.")
        return self._threads.submit(self._judge, _Job(task, completion, reference, compat))

    def metrics(self) -> dict[str, float]:
        """Totals so far: verify/completions, verify/timeouts, verify/failures (timeouts, memory, crashes)."""
        with self._lock:
            failures = sum(n for name, n in self.counts.items() if name != "completions")
            return {
                "verify/completions": float(self.counts["completions"]),
                "verify/timeouts": float(self.counts["timeout"]),
                "verify/failures": float(failures),
            }

    def close(self) -> None:
        """Ends the workers; jobs that wait are cancelled. Safe to call twice."""
        self.closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._all):
            worker.kill()
        self._threads.shutdown(wait=True)
        for worker in list(self._all):  # started while closing
            worker.kill()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:  # fmt: skip
        self.close()

    def _judge(self, job: _Job) -> Verdict:
        try:
            worker = self._idle.get_nowait()
        except Empty:
            worker = self._start()
        try:
            verdict = worker.judge(job)
        finally:
            if worker.alive:
                self._idle.put(worker)
            else:
                self._all.discard(worker)
        with self._lock:
            self.counts["completions"] += 1
            if verdict.failure is not None:
                self.counts[verdict.failure] += 1
        return verdict

    def _start(self) -> _Worker:
        worker = _Worker(self.timeout_s, self.memory_bytes)
        self._all.add(worker)
        return worker


class _Worker:
    """One process of worker.py in a session of its own, so that it dies with whatever it started."""

    def __init__(self, timeout_s: float, memory_bytes: int) -> None:
        self.timeout_s = timeout_s
        # the child sees the modules this process sees; torch is not imported there
        code = f"import sys; sys.path[:] = {sys.path!r}; from igpo.rewards.worker import main; main({memory_bytes})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            bufsize=0,
        )  # fmt: skip
        self.alive = True

    def judge(self, job: _Job) -> Verdict:
        """Raises VerifierError; what the worker reports about the reference or the task; nothing for completions."""
        limits = Limits(seconds=0.75 * self.timeout_s)
        request = {**asdict(job), "timeout_s": self.timeout_s, "limits": asdict(limits)}
        began = False
        try:
            assert self.process.stdin is not None
            send(self.process.stdin, request)
            began = "begin" in (answer := self._answer(STARTUP_S))
            if began:
                answer = self._answer(self.timeout_s)
        except TimeoutError:
            self.kill()
            if began:
                return Verdict(False, 0.0, None, "timeout")
            raise VerifierError(f"verify: a worker did not start in {STARTUP_S:.0f} s.") from None
        except (EOFError, BrokenPipeError) as error:
            self.kill()
            if began:
                return Verdict(False, 0.0, None, "crash")
            status = self.process.returncode
            raise VerifierError(f"verify: a worker ended with status {status}.") from error
        if "error" in answer:
            raise _ERRORS.get(answer["kind"], ValueError)(answer["error"])
        return Verdict(**answer["verdict"])

    def _answer(self, seconds: float) -> dict[str, Any]:
        stream = self.process.stdout
        assert stream is not None
        ready, _, _ = select.select([stream], [], [], seconds)
        if not ready:
            raise TimeoutError
        answer = receive(stream)
        if answer is None:
            raise EOFError
        if "crash" in answer:
            logger.warning("verify: a worker failed: %s", answer["crash"])
            raise EOFError
        return answer

    def kill(self) -> None:
        """Ends the process group."""
        self.alive = False
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (ReferenceValueError, ValueError, TypeError, ModuleNotFoundError, SandboxError)
}


@cache
def shared_pool(
    num_workers: int = 2, timeout_s: float = 10.0, memory_gib: float = 4.0
) -> VerifierPool:
    """The pool with these settings that all callers of this process share; it ends with the process."""
    pool = VerifierPool(num_workers, timeout_s, memory_gib)
    atexit.register(pool.close)
    return pool


def verify(task: str, completion: str, reference: Any, *, compat: str | None = None) -> Verdict:
    """Does a completion solve its task? Judged in a worker process of `shared_pool`, in at most 10 seconds.

    >>> verify("gsm8k", "2 * 9 = 18\\n#### 18", "18")
    Verdict(correct=True, score=1.0, extracted='18', failure=None)

    Args:
        task: gsm8k, math, countdown, sudoku or code; each documents its rules and references in igpo/rewards/. Or
            "module:function", a function of (completion, reference) that returns a Verdict or a bool.
        completion: what the policy wrote.
        reference: what the dataset says is right.
        compat: None, or "d1" for the published scorer of the d1 protocol (arXiv:2504.12216), defects included.
    Raises:
        ValueError: the task or compat is unknown. ReferenceValueError (a ValueError): the reference is not what the
        task needs. ModuleNotFoundError: the [math] extra is missing. SandboxError: programs cannot be confined here.
        VerifierError: a worker does not start. Nothing for a completion, whatever it holds.
    """
    return shared_pool().submit(task, completion, reference, compat).result()
