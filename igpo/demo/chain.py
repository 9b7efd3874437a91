"""The demo's task: a chain of modular arithmetic, x <- (x op d) mod m, whose trace lists every state.

    prompt      <s> +5 *3 -2 … 17          n operations and x_0
    completion  22 66 64 … 41 41 </s>      the n states, the answer (a copy of the last state), end

Every state and every operation is one token. x_0 comes last, so that every state, the first included, finds its
predecessor one place to the left and its operation n + 1 places to the left. The answer depends on all n operations in
sequence: a network of few layers cannot read it off the prompt, and a hint (a run of states) shortens the chain that
is left. The chance of guessing an answer is 1/m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from igpo.types import Prompt, Seed

PAD, MASK, BOS, EOS = "<pad>", "<mask>", "<s>", "</s>"
HELD_OUT = 8  # one problem in eight belongs to the held-out split


@dataclass(frozen=True)
class Chain:
    """The family of problems with `num_steps` operations out of {+, -, *} x digits, modulo `modulus`."""

    modulus: int
    num_steps: int
    digits: tuple[int, ...]

    @cached_property
    def operations(self) -> tuple[str, ...]:
        return tuple(f"{sign}{digit}" for sign in "+-*" for digit in self.digits)

    @cached_property
    def table(self) -> np.ndarray:
        """(operations, modulus): the next state."""
        x = np.arange(self.modulus)
        rules = {"+": np.add, "-": np.subtract, "*": np.multiply}
        return np.stack([rules[op[0]](x, int(op[1:])) % self.modulus for op in self.operations])

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The vocabulary; a word's id is its place."""
        return (PAD, MASK, BOS, EOS, *map(str, range(self.modulus)), *self.operations)

    @property
    def completion_length(self) -> int:
        return self.num_steps + 2

    def tokenizer(self) -> Any:  # PreTrainedTokenizerFast, whose ids are typed as anything
        vocabulary = {word: i for i, word in enumerate(self.words)}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
        return PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token=PAD, mask_token=MASK, bos_token=BOS, eos_token=EOS
        )

    def problems(self, count: int, seed: Seed, split: str) -> list[Prompt]:
        """`count` problems of the "train" or the "held-out" split; a problem belongs to one split for good."""
        rng = seed.named(f"chain/{split}").generator()
        found: list[Prompt] = []
        while len(found) < count:
            starts = rng.integers(self.modulus, size=4 * count)
            chosen = rng.integers(len(self.operations), size=(4 * count, self.num_steps))
            found += self._of_split(starts, chosen, split, len(found), count)
        return found

    def _of_split(
        self, starts: np.ndarray, chosen: np.ndarray, split: str, have: int, count: int
    ) -> list[Prompt]:
        weights = (
            7 * np.arange(1, self.num_steps + 1) + 3
        )  # chosen: any fixed hash of a problem would do
        held_out = (5 * starts + chosen @ weights) % HELD_OUT == 0
        keep = np.flatnonzero(held_out if split == "held-out" else ~held_out)[: count - have]
        return [
            self.prompt(int(starts[i]), chosen[i].tolist(), have + n) for n, i in enumerate(keep)
        ]

    def states(self, start: int, chosen: Sequence[int]) -> list[int]:
        x, out = start, []
        for op in chosen:
            x = int(self.table[op, x])
            out.append(x)
        return out

    def prompt(self, start: int, chosen: Sequence[int], row_id: int) -> Prompt:
        """The problem as a Prompt. Hints may show all states but the last, of which the answer is a copy."""
        states = self.states(start, chosen)
        question = [BOS, *(self.operations[op] for op in chosen), str(start)]
        trace = [*map(str, states), str(states[-1]), EOS]
        ids = {word: i for i, word in enumerate(self.words)}
        return Prompt(
            text=" ".join(question),
            ids=tuple(ids[word] for word in question),
            row_id=row_id,
            answer=str(states[-1]),
            trace=" ".join(trace[:-1]),
            trace_ids=tuple(ids[word] for word in trace),
            hint_length=self.num_steps - 1,
        )

    def is_correct(self, prompt: Prompt, completion: str) -> bool:
        """The verifier of every arm: each printed state follows from the one before, and the answer is the last state.

        It needs the prompt alone, no reference. A completion without EOS at its place has a word too many.
        """
        _, *operations, start = prompt.text.split()
        states = self.states(int(start), [self.operations.index(op) for op in operations])
        return completion.split() == [str(x) for x in (*states, states[-1])]
