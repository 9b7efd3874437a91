"""unmask_step's GPU backends: against the reference, and what only a GPU has (streams, graphs, devices, sizes)."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from gpu import DEVICE, is_slow, on_backend
from unmask_cases import (
    CONFIDENCES,
    DTYPES,
    MASK,
    assert_law_at_full_vocabulary,
    assert_same,
    draw,
    example,
)

from igpo.ops import _philox, _sampling, unmask_step, unmask_step_, use_backend


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_gpu_backends_match_the_reference(
    gpu_backend: str, temperature: float, confidence: str
) -> None:
    kind = DTYPES[CONFIDENCES.index(confidence) % 3]
    logits, tokens, eligible = example(1, 2, 4501, kind)
    tokens[:], eligible[0, 1] = MASK, True
    args = {
        "mask_id": MASK, "num_unmask": 1, "eligible": eligible, "temperature": temperature,
        "confidence": confidence, "suppress_tokens": [0, 17, 4200], "seed": 11,
    }  # fmt: skip
    got = unmask_step(logits, tokens, **args)
    with use_backend("reference"):
        want = unmask_step(logits, tokens, **args)
    assert_same(got, want)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("sampler", ["icdf", "gumbel"])
def test_clusters_and_split_rows_give_the_same_bits(
    temperature: float, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulated CUDA kernels: with clusters and without, threads in ascending and in descending order."""
    with on_backend("cuda", "unmask_step"):
        if DEVICE.type != "cpu":
            pytest.skip("the capability and the order of threads are the emulator's to choose")
        logits, tokens, eligible = example(1, 2, 17_001, torch.bfloat16)
        tokens[:], eligible[:] = MASK, True
        results = []
        for capability in ("90", "80"):
            for order in ("forward", "reverse"):
                monkeypatch.setenv("IGPO_EMULATE_CAPABILITY", capability)
                monkeypatch.setenv("IGPO_EMULATE_ORDER", order)
                args = {"temperature": temperature, "sampler": sampler, "confidence": "margin"}
                results.append(unmask_step(logits, tokens, mask_id=MASK, num_unmask=1, **args))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_long_sequences_commit_as_the_reference(gpu_backend: str, threshold: float | None) -> None:
    """Scores that are the same bits everywhere, or all the same; more keys than are ranked by counting."""
    lengths = (40, 1300) if gpu_backend == "triton" else (700, 1300)
    for length, vocab, confidence in ((lengths[0], 2, "random"), (lengths[1], 1, "prob")):
        logits, tokens = torch.randn(2, length, vocab), torch.full((2, length), MASK)
        if is_slow(gpu_backend):
            tokens[:, 300:-4] = 3
            tokens[:, 4:300] = 3 if gpu_backend == "triton" else MASK
            tokens[1, 3:-3] = 3
        rule = {"mask_id": MASK, "confidence": confidence, "threshold": threshold, "seed": 1}
        rule |= {"num_unmask": torch.tensor([min(290, int((tokens[0] == MASK).sum()) - 2), 4])}
        got = unmask_step(logits, tokens, **rule)
        with use_backend("reference"):
            want = unmask_step(logits, tokens, **rule)
        assert_same(got, want)


def test_commit_picks_what_the_reference_selects() -> None:
    """The Triton commit alone, on scores of a few values: keys that differ in their last digits."""
    with on_backend("triton", "unmask_step"):
        commit = importlib.import_module("igpo.kernels.unmask_commit")
        batch, length = 5, 1500
        score = torch.randint(-2, 3, (batch, length)).float() / 4
        score[0] = torch.randn(length)
        tokens = torch.where(torch.rand(batch, length) < 0.6, MASK, 3)
        tokens[3] = 3
        candidate = torch.where(torch.rand(batch, length) < 0.8, 7, -1)
        wanted = torch.tensor([1, 400, -1, 5, 10**12])
        valid, out = (tokens == MASK) & (candidate >= 0), torch.empty_like(tokens)
        for threshold in (None, 0.5):
            want = _sampling.select(score, valid, wanted, threshold)
            committed, left = torch.empty_like(valid), score.clone()
            commit.commit_kernel[(batch,)](
                tokens, None, candidate, wanted, out, committed, left, left.clone(), left.clone(),
                MASK, length, 0, threshold or 0.0, HAS_THRESHOLD=threshold is not None, BLOCK=1024,
            )  # fmt: skip
            assert torch.equal(committed, want)
            assert torch.equal(out, torch.where(want, candidate, tokens))
            assert torch.equal(left, torch.where(tokens == MASK, score, 0.0))


def test_noise_that_a_bound_would_miss(gpu_backend: str) -> None:
    """Two equal logits whose noise is far below what is likely: filters that assume otherwise must look again."""
    key, ids = _philox.key(0, 0, _philox.STREAM_GUMBEL), torch.arange(1 << 15)
    noise = _sampling.gumbel(key, torch.zeros_like(ids), ids, 2)
    unlikely = (noise.amax(-1) < math.log(2) - 2.01) & (noise.argmax(-1) == 1)
    ids = unlikely.nonzero()[:3, 0]
    drawn = draw(torch.zeros(3, 1, 2), row_ids=ids, sampler="gumbel")
    assert drawn.tolist() == [[1], [1], [1]]


gpu = pytest.mark.gpu
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["triton", "cuda"])
def on_gpu(request: pytest.FixtureRequest):
    """Forces a GPU backend, tensors on the GPU whatever IGPO_TEST_DEVICE says."""
    if DEVICE.type != "cuda":
        pytest.skip("IGPO_TEST_DEVICE=cuda makes the GPU backends compiled ones")
    with on_backend(request.param, "unmask_step"):
        yield request.param


@gpu
@no_gpu
@pytest.mark.parametrize("sampler", ["icdf", "gumbel"])
def test_law_at_full_vocabulary(on_gpu: str, sampler: str) -> None:
    assert_law_at_full_vocabulary(sampler, tail=-4.0, calls=100)


@gpu
@no_gpu
def test_a_captured_graph_follows_row_ids_and_tokens(on_gpu: str) -> None:
    logits, tokens, eligible = example(3, 20, 5000)
    ids, canvas = torch.arange(3), tokens.clone()
    rule = {
        "mask_id": MASK,
        "num_unmask": 2,
        "eligible": eligible,
        "temperature": 0.9,
        "row_ids": ids,
    }
    unmask_step(logits, canvas, **rule)  # compiles what there is to compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = unmask_step_(logits, canvas, **rule)
    for start in (0, 10, 2**40):
        ids.copy_(torch.arange(start, start + 3))
        canvas.copy_(tokens)
        graph.replay()
        want = unmask_step(logits, tokens, **rule)
        assert all(map(torch.equal, got, want))


@gpu
@no_gpu
def test_runs_on_the_current_stream(on_gpu: str) -> None:
    logits, tokens, _ = example(8, 64, 32_000)
    rule = {"mask_id": MASK, "num_unmask": 3, "temperature": 0.9}
    want = unmask_step(logits, tokens, **rule)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        later = torch.zeros_like(logits).copy_(logits)
        got = unmask_step(later, tokens, **rule)
    stream.synchronize()
    assert all(map(torch.equal, got, want))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_a_device_that_is_not_current(on_gpu: str) -> None:
    logits, tokens, _ = example(2, 5, 5000)
    rule = {"mask_id": MASK, "num_unmask": 2, "temperature": 0.9}
    want = unmask_step(logits, tokens, **rule)
    got = unmask_step(logits.to("cuda:1"), tokens.to("cuda:1"), **rule)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))


@gpu
@no_gpu
def test_more_than_two_to_the_31_elements(on_gpu: str) -> None:
    vocab, length = 126_464, 17_000
    assert vocab * length > 2**31
    logits = torch.zeros(1, length, vocab, dtype=torch.bfloat16)
    tokens = torch.full((1, length), 3)
    for row, token in ((0, 5), (16_985, 126_463), (length - 1, 77)):
        tokens[0, row] = MASK
        logits[0, row, token] = 9.0
    got = unmask_step(logits, tokens, mask_id=MASK, num_unmask=3)
    assert got.tokens[0, [0, 16_985, length - 1]].tolist() == [5, 126_463, 77]
    assert int(got.committed.sum()) == 3
