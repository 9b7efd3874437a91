"""Picks problems of GSM8K that fit a small canvas: python short_problems.py train.jsonl data [HELD_OUT]

Writes data/train.jsonl and data/eval.jsonl: problems of at most 200 characters with a solution of at most 130; the
last HELD_OUT of them (64 unless told) are for evaluation.
"""

import json
import sys
from pathlib import Path

QUESTION, ANSWER = 200, 130  # characters


def main(source: str, folder: str, held_out: str = "64") -> None:
    lines = Path(source).read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [(json.loads(line), line) for line in lines]
    short = [
        line
        for row, line in rows
        if len(row["question"]) <= QUESTION and len(row["answer"]) <= ANSWER
    ]
    cut = len(short) - int(held_out)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, part in (("train", short[:cut]), ("eval", short[cut:])):
        Path(folder, f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
        sys.stdout.write(f"{folder}/{name}.jsonl: {len(part)} problems\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
