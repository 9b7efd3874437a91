"""Worker processes: hostile completions cost one timeout each, are counted, and leave nothing behind."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from igpo.rewards import ReferenceValueError, Verdict, VerifierPool, make_reward
from igpo.rewards.references import ReferenceColumnError

TIMEOUT = 1.0
HANG = "hostile:hang"


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    before = workers()
    with VerifierPool(num_workers=2, timeout_s=TIMEOUT) as made:
        yield made
    assert workers() <= before


def workers() -> set[psutil.Process]:
    """What pools, and anything they judged, have running."""
    return set(psutil.Process().children(recursive=True))


@pytest.mark.parametrize(
    ("completion", "failure", "metric"),
    [
        ("power", "timeout", "verify/timeouts"),
        ("child", "timeout", "verify/timeouts"),
        ("exit", "crash", "verify/failures"),
        ("memory", "memory", "verify/failures"),
        ("raise", "crash", "verify/failures"),
    ],
)
def test_a_completion_that_breaks_its_worker_costs_one_timeout(
    completion: str, failure: str, metric: str
) -> None:
    before = workers()
    with VerifierPool(num_workers=1, timeout_s=TIMEOUT) as pool:
        assert pool.verify(HANG, ["ok"], ["ok"])[0].correct
        start = time.monotonic()
        (verdict,) = pool.verify(HANG, [completion], ["ok"])
        assert verdict == Verdict(False, 0.0, None, failure)
        assert time.monotonic() - start < TIMEOUT + 2
        assert pool.metrics()[metric] == 1
        assert pool.verify(HANG, ["ok", "no"], ["ok", "ok"]) == [
            Verdict(True, 1.0), Verdict(False, 0.0)
        ]  # fmt: skip
    assert workers() <= before


@pytest.mark.parametrize(
    ("task", "completion", "reference"),
    [
        ("math", r"\boxed{9^{9^{9^{9}}}}", "1"),
        ("math", "{" * 10**7, "1"),
        ("math", r"\boxed{" + "(" * 400 + "}", "x"),
        ("math", r"\boxed{" + r"\frac{" * 70 + "1" + "}{2}" * 70 + "}", "x"),
        ("gsm8k", r"\boxed{" * 10**6, 1),
        ("countdown", r"\boxed{9**9**9}", [[9, 9, 9], 9]),
        ("countdown", r"\boxed{" + "(" * 10**6, [[9], 9]),
        ("sudoku", "<answer>" + "1" * 10**7, ["0" * 16, None]),
        ("code", "import os\nwhile True:\n    os.fork()", {"tests": "pass"}),
        ("code", "while True: pass", {"tests": "pass"}),
    ],
    ids=lambda value: str(value)[:12],
)
def test_hostile_completions_are_wrong_in_bounded_time(
    pool: VerifierPool, task: str, completion: str, reference: object
) -> None:
    start = time.monotonic()
    (verdict,) = pool.verify(task, [completion], [reference])
    assert not verdict.correct
    assert (
        time.monotonic() - start < 30
    )  # the timeout, and starting an interpreter on a busy machine


def test_verdicts_keep_their_order_and_do_not_wait_for_a_hung_one(pool: VerifierPool) -> None:
    texts = ["1", "2", "power", *map(str, range(3, 60))]
    verdicts = pool.verify(HANG, texts, ["2"] * len(texts))
    assert [v.correct for v in verdicts] == [text == "2" for text in texts]
    assert verdicts[2].failure == "timeout"


def test_a_bad_reference_is_the_callers_error_and_keeps_the_worker(pool: VerifierPool) -> None:
    with pytest.raises(ReferenceValueError, match="task 'gsm8k' must be a number, got 'x'"):
        pool.verify("gsm8k", ["1"], ["x"])
    with pytest.raises(ValueError, match="got 1 and 2"):
        pool.verify("gsm8k", ["1"], ["1", "2"])
    with pytest.raises(ValueError, match="task must be one of"):
        pool.verify("nothing", ["1"], ["1"])
    with pytest.raises(TypeError, match="a completion must be text, got int"):
        pool.verify("gsm8k", [1], ["1"])  # type: ignore[list-item]
    assert pool.verify("gsm8k", ["1"], ["1"])[0].correct


@pytest.mark.parametrize("key", ["num_workers", "timeout_s", "memory_gib"])
def test_settings_must_be_positive(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} must be positive, got 0"):
        VerifierPool(**{key: 0})


def test_reward_functions_in_trls_form(pool: VerifierPool) -> None:
    texts = [r"\boxed{4}", [{"role": "assistant", "content": r"\boxed{5}"}], "6"]
    columns = {"gold": ["4", "4", None], "level": [1, 2, 3]}
    reward = make_reward("math", columns={"answer": "gold"}, pool=pool)
    assert reward(prompts=["q"] * 3, completions=texts, **columns) == [1.0, 0.0, None]
    assert reward.__name__ == "math_reward"
    later = make_reward("gsm8k", columns={"answer": "gold"}, pool=pool, asynchronous=True)
    assert asyncio.iscoroutinefunction(later)
    assert asyncio.run(later(["q"] * 3, texts, **columns)) == [1.0, 0.0, None]
    cells = make_reward("sudoku", partial=True, pool=pool)
    grid = "<answer>1234341221434312</answer>"
    values = cells(["q"], [grid], puzzle=["1234341221434300"])
    assert values == [0.0]
    with pytest.raises(
        ReferenceColumnError, match="'countdown' needs column 'target', got numbers"
    ):
        make_reward("countdown", pool=pool)(["q"], ["1"], numbers=[[1]])


def test_workers_end_with_their_process_even_when_it_is_killed() -> None:
    code = (
        "from igpo.rewards import verify; import sys, time, psutil; "
        "assert verify('gsm8k', '#### 1', '1').correct; "
        "print(*[p.pid for p in psutil.Process().children()], flush=True); {}"
    )
    for ending in ("sys.exit()", "time.sleep(60)"):
        with subprocess.Popen(
            [sys.executable, "-c", code.format(ending)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            (worker,) = map(int, process.stdout.readline().split())
            if ending.startswith("time"):
                process.kill()
        end = time.monotonic() + 20
        while psutil.pid_exists(worker) and time.monotonic() < end:
            time.sleep(0.05)
        assert not psutil.pid_exists(worker)
