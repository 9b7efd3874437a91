"""A verifier that some completions keep busy for ever, or that they end: what tests of worker processes call."""

from __future__ import annotations

import os
import subprocess
import sys
import time


def hang(completion: str, reference: object) -> bool:
    if completion == "power":
        return bool(9**9**9)
    if completion == "exit":
        os._exit(3)
    if completion == "memory":
        return bool(bytearray(1 << 36))
    if completion == "raise":
        raise LookupError("a defect of the verifier")
    if completion == "child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        time.sleep(600)
    return completion == reference
