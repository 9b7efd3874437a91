"""The process that judges completions for pool.py: requests on standard input, verdicts on standard output.

Messages are a length (4 bytes) and JSON. A request gets {"begin": true} once what its task needs is loaded, from when
its time counts, then its verdict. If nobody kills this process in time, an alarm of the kernel does, even where the
interpreter is stuck inside one operation; it never outlives its input by more than one completion.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from dataclasses import asdict
from typing import IO, Any

from .sandbox import Limits, SandboxError
from .tasks import judge, prepare
from .verdict import Verdict

_LENGTH = struct.Struct("<I")
_GRACE = 2.0  # seconds after which the alarm replaces the parent's kill; chosen


def send(stream: IO[bytes], message: Any) -> None:
    data = json.dumps(message).encode()
    left = memoryview(_LENGTH.pack(len(data)) + data)
    while left:  # unbuffered streams may take a part
        left = left[stream.write(left) :]
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """The next message; None at the end of the stream."""
    head = _exactly(stream, _LENGTH.size)
    body = None if head is None else _exactly(stream, _LENGTH.unpack(head)[0])
    return None if body is None else json.loads(body)


def _exactly(stream: IO[bytes], size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = stream.read(size - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def main(memory_bytes: int) -> None:
    """Answers requests until the input ends."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    answers = os.fdopen(os.dup(1), "wb")
    quiet = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # libraries may print; answers must stay readable
        os.dup2(quiet, descriptor)
    sys.excepthook = lambda kind, error, _: send(
        answers, {"crash": f"{kind.__name__}: {error}"[:500]}
    )
    with os.fdopen(os.dup(0), "rb") as requests:
        while (request := receive(requests)) is not None:
            send(answers, answer(request, answers))


def answer(request: dict[str, Any], answers: IO[bytes]) -> dict[str, Any]:
    """{"verdict": fields} or {"error": message, "kind": class}, for a request the caller must put right."""
    try:
        prepare(request["task"])
        send(answers, {"begin": True})
        signal.setitimer(signal.ITIMER_REAL, request["timeout_s"] + _GRACE)
        limits = Limits(**request["limits"])
        verdict = judge(
            request["task"], request["completion"], request["reference"], compat=request["compat"], limits=limits
        )  # fmt: skip
    except (MemoryError, RecursionError):
        verdict = Verdict(False, 0.0, None, "memory")
    except (ValueError, TypeError, ModuleNotFoundError, SandboxError) as error:
        return {"error": str(error), "kind": type(error).__name__}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {"verdict": asdict(verdict)}
