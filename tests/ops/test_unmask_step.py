"""unmask_step: scores, commits, and the contract around them. Its draws: test_unmask_step_draws.py."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu import DEVICE, is_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from unmask_cases import CONFIDENCES, DTYPES, MASK, assert_same, example

from igpo.ops import BackendError, unmask_step, unmask_step_, use_backend


def naive(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    eligible: torch.Tensor,
    counts: list[int],
    confidence: str = "prob",
    threshold: float | None = None,
    suppress: tuple[int, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition at temperature 0, one position at a time, in Python floats."""
    tokens = tokens.clone()
    committed = torch.zeros_like(eligible)
    score, logprob, entropy = (torch.zeros(tokens.shape, dtype=torch.float64) for _ in range(3))
    for b in range(tokens.shape[0]):
        ranked = []
        for i in range(tokens.shape[1]):
            if tokens[b, i] != MASK or not eligible[b, i]:
                continue
            row = logits[b, i].double().tolist()
            for v in suppress:
                row[v] = -math.inf
            best = max(range(len(row)), key=lambda v: (row[v], -v))
            e = [math.exp(x - row[best]) for x in row]
            total = math.fsum(e)
            p = [x / total for x in e]
            h = -math.fsum(x * math.log(x) for x in p if x > 0)
            top = [*sorted(p, reverse=True), 0.0]
            score[b, i] = {"prob": p[best], "margin": top[0] - top[1], "entropy": -h}[confidence]
            logprob[b, i], entropy[b, i] = math.log(p[best]), h
            ranked.append((-score[b, i].item(), i, best))
        for rank, (negative, i, best) in enumerate(sorted(ranked)):
            above = threshold is not None and (-negative >= threshold or rank == 0)
            if rank < counts[b] or above:
                tokens[b, i], committed[b, i] = best, True
    return tokens, committed, score, logprob, entropy


TURNS = [
    (0.0, "icdf", "prob"), (1.0, "gumbel", "random"), (1.3, "icdf", "margin"), (1.3, "gumbel", "entropy"),
]  # fmt: skip
SHAPES = [(1, 1, 1), (2, 3, 2), (3, 5, 7), (2, 4, 101), (1, 3, 4096), (2, 2, 4159), (1, 2, 12289)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("confidence", CONFIDENCES[:3])
def test_greedy_matches_definition(
    backend: str, shape: tuple, dtype: torch.dtype, confidence: str, ran
) -> None:
    turn = SHAPES.index(shape) + DTYPES.index(dtype) + CONFIDENCES.index(confidence)
    if is_slow(backend) and dtype != torch.float32 and turn % 3:
        pytest.skip("not interpreted or emulated: the 16-bit types take turns")
    shape = (1, 1, shape[2]) if is_slow(backend) else shape
    logits, tokens, eligible = example(*shape, dtype)
    if is_slow(backend):
        tokens[0, 0], eligible[0, 0] = MASK, True
    counts = torch.randint(0, 4, (shape[0],))
    got = unmask_step(
        logits, tokens, mask_id=MASK, num_unmask=counts, eligible=eligible, confidence=confidence
    )
    assert_same(got, naive(logits, tokens, eligible, counts.tolist(), confidence))
    assert ran("unmask_step") == backend


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_every_instruction_set_matches_the_reference(
    isa: str, dtype: torch.dtype, temperature: float, confidence: str
) -> None:
    """The reference computes in float64; statistics are compared at the token the kernel drew."""
    logits, tokens, eligible = example(3, 7, 4501, dtype)
    args = {
        "mask_id": MASK, "num_unmask": 2, "eligible": eligible, "temperature": temperature,
        "confidence": confidence, "suppress_tokens": [0, 17, 4200], "seed": 11,
    }  # fmt: skip
    got = unmask_step(logits, tokens, **args)
    with use_backend("reference"):
        want = unmask_step(logits, tokens, **args)
    assert_same(got, want)


def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    logits, tokens, eligible = example(2, 9, 9001)
    for sampler in ("icdf", "gumbel"):
        for rows in (slice(None), slice(1)):  # whole rows per task, and slices of the vocabulary
            args = logits[rows], tokens[rows]
            given = {"eligible": eligible[rows], "temperature": 0.8, "sampler": sampler}
            with use_backend("cpu"):
                many = unmask_step(*args, mask_id=MASK, num_unmask=3, **given)
                torch.set_num_threads(1)
                one = unmask_step(*args, mask_id=MASK, num_unmask=3, **given)
                torch.set_num_threads(threads)
            assert all(map(torch.equal, one, many))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_commits_the_right_number_and_touches_nothing_else(data: st.DataObject) -> None:
    batch, length = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 9))
    vocab = data.draw(st.sampled_from([1, 2, 5, 70]))
    temperature = data.draw(st.sampled_from([0.0, 0.7, 1.0]))
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    logits, tokens, eligible = example(batch, length, vocab)
    logits = logits.round()  # many ties
    counts = torch.randint(-1, 5, (batch,))
    before = logits.clone(), tokens.clone(), eligible.clone(), counts.clone()
    results = []
    for name in ("reference", "cpu"):
        with use_backend(name):
            got = unmask_step(
                logits, tokens, mask_id=MASK, num_unmask=counts, eligible=eligible,
                temperature=temperature, confidence=data.draw(st.sampled_from(CONFIDENCES)),
                sampler=data.draw(st.sampled_from(["icdf", "gumbel"])),
            )  # fmt: skip
        live = (tokens == MASK) & eligible
        wanted = torch.minimum(live.sum(-1), counts.clamp(min=0))
        assert torch.equal(got.committed.sum(-1), wanted)
        assert not (got.committed & ~live).any()
        assert torch.equal(got.tokens != tokens, got.committed)
        assert (got.tokens[got.committed] < vocab).all()
        for statistic in got[2:]:
            assert (statistic[~live] == 0).all()
        least = torch.where(got.committed, got.score, torch.inf).amin(-1) if length else None
        if least is not None:  # nothing left behind scores higher than what was committed
            left = torch.where(live & ~got.committed, got.score, -torch.inf).amax(-1)
            assert (left <= least).all()
        results.append(got)
    assert all(map(torch.equal, before, (logits, tokens, eligible, counts)))


def test_ties_go_to_the_lower_token_and_the_lower_position(backend: str) -> None:
    logits = torch.zeros(1, 4, 9000)
    logits[..., [8000, 5, 4097]] = 2.0
    got = unmask_step(logits, torch.full((1, 4), MASK), mask_id=MASK, num_unmask=2)
    assert got.tokens.tolist() == [[5, 5, MASK, MASK]]
    one_hot = torch.full((1, 2, 3), -torch.inf)  # entropy 0, as -0 and as +0
    one_hot[..., 1] = torch.tensor([-1.0, 1.0])
    got = unmask_step(
        one_hot, torch.full((1, 2), MASK), mask_id=MASK, num_unmask=1, confidence="entropy"
    )
    assert got.committed.tolist() == [[True, False]]


@pytest.mark.parametrize("num_unmask", [0, 1, 3, torch.tensor([0, 1, 2])], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_threshold_commits_what_reaches_it_and_at_least_one(
    backend: str, num_unmask: int | torch.Tensor, threshold: float
) -> None:
    logits, tokens, eligible = example(3, 2 if is_slow(backend) else 8, 11, scale=4.0)
    tokens[:, 0], eligible[:2, 0], eligible[2] = MASK, True, False
    got = unmask_step(
        logits, tokens, mask_id=MASK, num_unmask=num_unmask, eligible=eligible, threshold=threshold
    )
    counts = num_unmask.tolist() if isinstance(num_unmask, torch.Tensor) else [num_unmask] * 3
    assert_same(got, naive(logits, tokens, eligible, counts, threshold=threshold))
    assert got.committed.any(-1).tolist() == [True, True, False]


def test_threshold_is_compared_in_the_precision_of_the_score(backend: str) -> None:
    logits = torch.tensor([0.3, 0.7]).log().expand(1, 2, 2)
    tokens = torch.full((1, 2), MASK)
    score = unmask_step(logits, tokens, mask_id=MASK, num_unmask=0).score[0, 0].item()
    got = unmask_step(logits, tokens, mask_id=MASK, num_unmask=0, threshold=score)
    assert got.committed.all()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1.3])
@pytest.mark.parametrize("sampler", ["icdf", "gumbel"])
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_rows_without_a_distribution_are_left_alone(
    backend: str, temperature: float, sampler: str, confidence: str
) -> None:
    if is_slow(backend) and (temperature, sampler, confidence) not in TURNS:
        pytest.skip("not interpreted or emulated: one combination of each kind is")
    logits = torch.randn(1, 7, 4500)
    logits[0, 0, 4400] = torch.nan
    logits[0, 1] = -torch.inf
    logits[0, 2, 7] = torch.inf
    logits[0, 3] = torch.nan
    logits[0, 4, :4499] = -torch.inf  # one token left
    logits[0, 5, 3] = torch.nan  # but suppressed
    got = unmask_step(
        logits, torch.full((1, 7), MASK), mask_id=MASK, num_unmask=9, temperature=temperature,
        sampler=sampler, confidence=confidence, suppress_tokens=[3], threshold=-100.0,
    )  # fmt: skip
    bad = torch.tensor([True, True, True, True, False, False, False])
    assert torch.equal(got.committed[0], ~bad)
    assert torch.equal(got.score[0].isnan(), bad)
    assert (got.tokens[0, bad] == MASK).all()
    assert (got.logprob[0, bad] == 0).all()
    assert (got.entropy[0, bad] == 0).all()
    assert got.tokens[0, 4] == 4499
    assert got.logprob[0, 4] == 0
    assert got.entropy[0, 4] == 0
    assert torch.isfinite(got.score[0, 4:]).all()
    assert not (got.tokens == 3).any()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_extreme_logits(backend: str, temperature: float) -> None:
    """Spikes, very negative and equal logits: statistics stay exact."""
    logits = torch.stack(
        [torch.zeros(5000), torch.full((5000,), -1e4), torch.full((5000,), 3e38), torch.zeros(5000)]
    )[None]
    logits[0, 3, 2500] = 1e4
    got = unmask_step(
        logits, torch.full((1, 4), MASK), mask_id=MASK, num_unmask=0, temperature=temperature
    )
    n = math.log(5000)
    torch.testing.assert_close(got.logprob[0], torch.tensor([-n, -n, -n, 0.0]))
    torch.testing.assert_close(got.entropy[0], torch.tensor([n, n, n, 0.0]))
    torch.testing.assert_close(got.score[0], torch.tensor([1 / 5000] * 3 + [1.0]))


def test_strides_do_not_matter(backend: str) -> None:
    n, length = (2, 2) if is_slow(backend) else (7, 3)
    big = torch.randn(5, 11, 3000)
    logits = big.transpose(0, 1)[2 : 2 + n, 1 : 1 + length, 1:2750]
    tokens = torch.where(torch.rand(length, n) < 0.8, MASK, 0).t()
    eligible = (torch.rand(length, n) < 0.8).t()
    counts = torch.arange(2 * n)[::2]
    rule = {"mask_id": MASK, "temperature": 0.7, "row_ids": torch.arange(2 * n)[1::2]}
    assert not logits.is_contiguous()
    assert not tokens.is_contiguous()
    got = unmask_step(logits, tokens, num_unmask=counts, eligible=eligible, **rule)
    dense = (x.contiguous() for x in (logits, tokens, counts, eligible))
    logits_, tokens_, counts_, eligible_ = dense
    want = unmask_step(logits_, tokens_, num_unmask=counts_, eligible=eligible_, **rule)
    assert all(map(torch.equal, got, want))
    expanded = unmask_step(
        logits_[:1].expand(n, length, 2749), tokens, num_unmask=1, mask_id=MASK, eligible=eligible
    )
    assert expanded.committed.sum() == ((tokens == MASK) & eligible).any(-1).sum()


@pytest.mark.parametrize("contiguous", [True, False])
def test_in_place_writes_tokens_and_only_tokens(backend: str, contiguous: bool) -> None:
    logits, tokens, eligible = example(1, 3, 40) if is_slow(backend) else example(3, 6, 40)
    tokens = tokens if contiguous else tokens.repeat(2, 2)[::2, ::2]
    before = logits.clone()
    rule = {"mask_id": MASK, "num_unmask": 2, "eligible": eligible, "temperature": 1.1, "seed": 4}
    want = unmask_step(logits, tokens, **rule)
    assert not torch.equal(want.tokens, tokens)
    got = unmask_step_(logits, tokens, **rule)
    assert got.tokens is tokens
    assert all(map(torch.equal, got, want))
    assert torch.equal(logits, before)


def test_suppressed_tokens_leave_the_distribution(backend: str) -> None:
    logits, tokens, eligible = example(2, 1 if is_slow(backend) else 5, 8200)
    tokens[0], eligible[0] = MASK, True
    suppress = (8199, 0, 4097, 4097)
    got = unmask_step(
        logits, tokens, mask_id=MASK, num_unmask=5, eligible=eligible, suppress_tokens=suppress
    )
    assert_same(got, naive(logits, tokens, eligible, [5, 5], suppress=suppress))
    ids = torch.tensor([*suppress, -1, 8200, 2**40])  # a tensor is not checked; the rest is ignored
    same = unmask_step(
        logits, tokens, mask_id=MASK, num_unmask=5, eligible=eligible, suppress_tokens=ids
    )
    assert all(map(torch.equal, got, same))


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (0, 0, 1)])
def test_empty_batch(backend: str, shape: tuple[int, int, int]) -> None:
    logits, tokens, eligible = example(*shape)
    got = unmask_step(logits, tokens, mask_id=MASK, num_unmask=2, eligible=eligible, threshold=0.5)
    assert [x.shape for x in got] == [shape[:2]] * 5


def test_float64_is_for_the_reference() -> None:
    logits, tokens, eligible = example(2, 5, 30, torch.float64)
    rule = {"mask_id": MASK, "num_unmask": 2, "eligible": eligible}
    got = unmask_step(logits, tokens, **rule)
    assert got.score.dtype == got.logprob.dtype == got.entropy.dtype == torch.float64
    with use_backend("cpu"), pytest.raises(BackendError, match=r"not torch\.float64"):
        unmask_step(logits, tokens, **rule)


UNREADABLE = """
import ctypes, mmap, sys, torch
from gpu import on_backend
from igpo.ops import unmask_step
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 8 * page)
logits = torch.frombuffer(memory, dtype=torch.float32).view(2, 4, page // 4)
logits.copy_(torch.randn(2, 4, page // 4))
tokens = torch.full((2, 4), -1)
tokens[0, 1] = 5                                    # not masked
eligible = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]]).bool()
libc = ctypes.CDLL(None, use_errno=True)
for row in (1, 2, 4, 5, 6, 7):
    address = ctypes.c_void_p(logits.data_ptr() + row * page)
    assert libc.mprotect(address, ctypes.c_size_t(page), 0) == 0
for name in sys.argv[1:]:
    for temperature in (0.0, 1.3):
        with on_backend(name, "unmask_step"):
            step = unmask_step(logits, tokens, mask_id=-1, num_unmask=3, eligible=eligible,
                               temperature=temperature, sampler="gumbel")
        assert step.committed.tolist() == [[True, False, False, True], [False] * 4]
print("read only what may be read")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect")
def test_rows_that_take_no_part_are_not_read() -> None:
    """They lie in memory that may not be read: touching one kills the process."""
    names = ["cpu", "reference", *(("triton", "cuda") if DEVICE.type == "cpu" else ())]
    result = subprocess.run(
        [sys.executable, "-c", UNREADABLE, *names], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert result.stdout == "read only what may be read\n", (result.returncode, result.stderr)


def test_compiles_and_passes_opcheck(backend: str) -> None:
    # 12 steps: more than torch would recompile for
    batch, length, last = (1, 1, 1) if is_slow(backend) else (2, 5, 12)
    logits, tokens, eligible = example(batch, length, 33)
    tokens[0], counts, ids = MASK, torch.tensor([1, 2])[:batch], torch.tensor([4, 9])[:batch]
    values = (MASK, 0, 0.8, "prob", 0.9, "icdf", 7, 2)
    for op in (torch.ops.igpo.unmask_step.default, torch.ops.igpo.unmask_step_.default):
        torch.library.opcheck(op, (logits, tokens, eligible, counts, ids, ids, *values))
        if not is_slow(backend):
            torch.library.opcheck(op, (logits, tokens, None, None, None, None, *values))

    def steps(logits: torch.Tensor, tokens: torch.Tensor, step: int) -> torch.Tensor:
        rule = {"mask_id": MASK, "num_unmask": 1, "temperature": 0.8, "suppress_tokens": (1, 2)}
        first = unmask_step(logits, tokens, step=step, **rule)
        canvas = first.tokens.clone()
        second = unmask_step_(logits * 2, canvas, step=step + 1, **rule)
        return canvas + second.committed + first.logprob

    compiled = torch.compile(steps, fullgraph=True, backend="aot_eager")
    for step in range(last):
        assert torch.equal(compiled(logits, tokens, step), steps(logits, tokens, step))


def test_takes_no_part_in_autograd(backend: str) -> None:
    logits, tokens, _ = example(1, 3, 9)
    step = unmask_step(logits.requires_grad_(), tokens, mask_id=MASK, num_unmask=1)
    assert not any(x.requires_grad for x in step)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_unmask": torch.zeros(4, dtype=torch.int64)},
            r"unmask_step: num_unmask must be an int >= 0 or an int64 tensor \(B,\)=\(2,\), got shape \(4,\), int64",
        ),
        ({"num_unmask": torch.zeros(2)}, r"num_unmask must be .*got shape \(2,\), float32"),
        ({"num_unmask": -1}, r"num_unmask must be an int >= 0 .*, got -1\."),
        ({"num_unmask": True}, "num_unmask must be .*, got True"),
        ({"num_unmask": 1.0}, r"num_unmask must be .*, got 1\.0"),
        ({"logits": torch.zeros(2, 9)}, r"logits must have 3 dimensions \(B, L, V\), got"),
        ({"logits": torch.zeros(2, 9, 3).mT}, "logits must have a contiguous last dimension"),
        ({"logits": torch.zeros(2, 3, 9).long()}, "logits must be float32 | bfloat16"),
        ({"tokens": torch.zeros(2, 4).long()}, r"tokens must have shape \(2, 3\), got .*\(2, 4\)"),
        ({"tokens": torch.zeros(2, 3)}, r"tokens must be int64, got shape \(2, 3\), float32"),
        ({"eligible": torch.zeros(2, 3)}, "eligible must be bool, got .*float32"),
        ({"row_ids": torch.zeros(3).long()}, r"row_ids must have shape \(2,\), got shape \(3,\)"),
        ({"temperature": -0.1}, r"temperature must be finite and >= 0, got -0\.1\. 0 takes"),
        ({"temperature": math.nan}, "temperature must be finite"),
        ({"confidence": "top"}, r"confidence must be one of \('prob', .*, got 'top'"),
        ({"sampler": "top"}, r"sampler must be one of \('icdf', 'gumbel'\), got 'top'"),
        ({"threshold": math.nan}, "threshold must be a number or None, got nan"),
        ({"seed": 2**63}, "seed must fit in 64 bits"),
        ({"suppress_tokens": [9]}, r"suppress_tokens must be in \[0, V=9\), got 9"),
        ({"suppress_tokens": torch.zeros(1)}, "suppress_tokens must be int64, got"),
        ({"suppress_tokens": torch.zeros(1, 1).long()}, "suppress_tokens must have one dimension"),
    ],
)
def test_rejects_bad_input(change: dict, message: str) -> None:
    good = {
        "logits": torch.zeros(2, 3, 9), "tokens": torch.zeros(2, 3).long(), "mask_id": MASK,
        "num_unmask": 1,
    }  # fmt: skip
    for op in (unmask_step, unmask_step_):
        with pytest.raises(ValueError, match=message.replace("unmask_step:", f"{op.__name__}:")):
            op(**(good | change))
