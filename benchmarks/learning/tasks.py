"""The three tasks: state chains (shorter than the demo's), Countdown with three numbers, 4x4 Sudoku with one solution.

Every word is one token. A problem belongs to one split for good, by a hash: of numbers and target (Countdown), of the
full grid (Sudoku: no held-out puzzle has the solution of a training puzzle), of operations and start (chains).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from igpo.demo.chain import BOS, EOS, HELD_OUT, MASK, PAD, Chain
from igpo.demo.task import Task
from igpo.options import PuzzleOptions
from igpo.puzzles import DRAWS, Row, key
from igpo.rewards.tasks import judge
from igpo.types import Prompt, Seed

IDLE = 20_000  # draws without a new problem after which there are taken to be no more (chosen)


@dataclass(frozen=True)
class Text:
    """A problem as words, and what its split hangs on."""

    prompt: list[str]
    trace: list[str]
    split_key: str


@dataclass(frozen=True)
class Puzzles:
    """Problems of igpo.puzzles, judged by the verifier of that name in igpo.rewards.

    joined: completions are decoded without spaces between tokens.
    """

    options: PuzzleOptions
    words: tuple[str, ...]
    text: Callable[[Row], Text]
    joined: bool = False

    def tokenizer(self) -> Any:
        vocabulary = {word: i for i, word in enumerate(self.words)}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
        if self.joined:
            core.decoder = decoders.Fuse()  # type: ignore[assignment]
        return PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token=PAD, mask_token=MASK, bos_token=BOS, eos_token=EOS
        )

    def problems(self, count: int, seed: Seed, split: str) -> list[Prompt]:
        """`count` different problems of the "train" or the "held-out" split. Raises ValueError where there are less."""
        rng = seed.named(f"{self.options.puzzle}/{split}").generator()
        draw, found, idle = DRAWS[self.options.puzzle], {}, 0
        while len(found) < count:
            row, before = draw(rng, self.options), len(found)
            if row is not None and (_held_out(self.text(row).split_key) == (split == "held-out")):
                found.setdefault(key(row), row)
            idle = 0 if len(found) > before else idle + 1
            if idle > IDLE:
                raise ValueError(
                    f"problems: there must be {count} different {self.options.puzzle} problems in split {split!r}, "
                    f"found {before}. Ask for fewer, or widen the numbers."
                )
        return [self._prompt(row, i) for i, row in enumerate(found.values())]

    def _prompt(self, row: Row, row_id: int) -> Prompt:
        text, ids = self.text(row), {word: i for i, word in enumerate(self.words)}
        return Prompt(
            text=" ".join(text.prompt),
            ids=tuple(ids[word] for word in text.prompt),
            row_id=row_id,
            answer=str(row.get("answer", row.get("solution"))),
            trace=" ".join(text.trace),
            trace_ids=tuple(ids[word] for word in text.trace),
            hint_length=len(text.trace),
            columns={name: row[name] for name in ("numbers", "target", "puzzle") if name in row},
        )

    def is_correct(self, prompt: Prompt, completion: str) -> bool:
        """The completion is the answer, which the verifiers look for in a tag."""
        answer = f"<answer>{completion}</answer>"
        return judge(self.options.puzzle, answer, dict(prompt.columns)).correct


@dataclass(frozen=True)
class Pool:
    """`size` training problems of a task, drawn once, from which batches are drawn."""

    task: Task
    size: int

    @cached_property
    def drawn(self) -> list[Prompt]:
        return self.task.problems(self.size, Seed(0), "train")

    def problems(self, count: int, seed: Seed, split: str) -> list[Prompt]:
        places = seed.named("pool").generator().choice(len(self.drawn), count, replace=False)
        return [replace(self.drawn[place], row_id=i) for i, place in enumerate(places.tolist())]

    def tokenizer(self) -> Any:
        return self.task.tokenizer()

    def is_correct(self, prompt: Prompt, completion: str) -> bool:
        return self.task.is_correct(prompt, completion)


def _held_out(text: str) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT == 0


def countdown_text(row: Row) -> Text:
    """3 4 5 35 -> ( 3 + 4 ) * 5 </s>; hints show any of it, as there is no answer beside the expression."""
    expression = re.findall(r"\d+|[-+*/()]", row["answer"])
    return Text([*map(str, row["numbers"]), str(row["target"])], [*expression, EOS], key(row))


def sudoku_text(row: Row) -> Text:
    """16 digits, 0 for an empty cell -> 16 digits; hints show cells."""
    return Text(list(row["puzzle"]), list(row["solution"]), row["solution"])


_COUNTDOWN = PuzzleOptions(puzzle="countdown", num_numbers=3, max_number=12, max_target=60)
_SUDOKU = PuzzleOptions(puzzle="sudoku", num_empty=5)
_NUMBERS = map(str, range(1, _COUNTDOWN.max_target + 1))

COUNTDOWN = Puzzles(
    _COUNTDOWN,
    (PAD, MASK, BOS, EOS, *_NUMBERS, *"+-*/()"),
    countdown_text,
)
SUDOKU = Puzzles(_SUDOKU, (PAD, MASK, BOS, EOS, *"01234"), sudoku_text, joined=True)
CHAIN = Chain(modulus=31, num_steps=6, digits=(2, 3, 4, 5))
TASKS: Mapping[str, Task] = {"chain": CHAIN, "countdown": COUNTDOWN, "sudoku": SUDOKU}
