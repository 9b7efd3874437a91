from __future__ import annotations

import pytest

from igpo.demo.chain import Chain
from igpo.types import Seed

CHAIN = Chain(modulus=13, num_steps=5, digits=(2, 3))


def evaluate(text: str, modulus: int) -> list[int]:
    """The states of a problem, computed from its text."""
    _, *operations, start = text.split()
    x, states = int(start), []
    for op in operations:
        digit = int(op[1:])
        x = {"+": x + digit, "-": x - digit, "*": x * digit}[op[0]] % modulus
        states.append(x)
    return states


def test_traces_are_right_and_hints_hold_neither_answer_nor_its_copy() -> None:
    tokenizer = CHAIN.tokenizer()
    for prompt in CHAIN.problems(50, Seed(1), "train"):
        states = evaluate(prompt.text, 13)
        assert prompt.trace == " ".join(map(str, [*states, states[-1]]))
        assert prompt.answer == str(states[-1])
        assert tokenizer.decode(prompt.trace_ids[: prompt.hint_length]).split() == [
            str(s) for s in states[:-1]
        ]
        assert tokenizer(prompt.text)["input_ids"] == list(prompt.ids)
        assert tokenizer.decode(prompt.ids) == prompt.text


def test_splits_are_disjoint_and_reproducible() -> None:
    train = {p.text for p in CHAIN.problems(400, Seed(1), "train")}
    held_out = {p.text for p in CHAIN.problems(400, Seed(2), "held-out")}
    assert not train & held_out
    assert [p.text for p in CHAIN.problems(7, Seed(3), "train")] == [
        p.text for p in CHAIN.problems(7, Seed(3), "train")
    ]
    assert [p.row_id for p in CHAIN.problems(20, Seed(3), "train")] == list(range(20))


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("{trace}", True),
        ("0 0 0 0 0 {answer}", False),
        ("{trace} 0", False),
        ("{answer}", False),
        ("0 0 0 0 0 wrong", False),
        ("", False),
    ],
)
def test_verifier_reads_the_answer_at_its_place(completion: str, verdict: bool) -> None:
    prompt = CHAIN.problems(1, Seed(4), "train")[0]
    text = completion.format(trace=prompt.trace, answer=prompt.answer)
    assert CHAIN.is_correct(prompt, text) is verdict
