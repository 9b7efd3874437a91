from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu import is_slow
from row_cases import DTYPES, IGNORED, gradients, leaf, logprob_formula, memory_sizes, peak_bytes
from tolerances import assert_as_good_as_torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from igpo.ops import BackendError, linear_logprob, token_logprob, use_backend

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]

# row shape, D, V: none, one, primes, more than the default chunk of 64 rows
SHAPES = [
    ((0,), 3, 5),
    ((1,), 1, 1),
    ((3, 5), 7, 31),
    ((0, 2), 4, 3),
    ((131,), 17, 257),
    ((), 8, 9),
]


def quick(shape: tuple, backend: str) -> tuple:
    """shape, with fewer rows where each takes milliseconds."""
    rows, width, vocab = shape
    return (tuple(min(n, 13) for n in rows) if is_slow(backend) else rows), width, vocab


def example(rows: tuple[int, ...], width: int, vocab: int, dtype=torch.float32) -> Inputs:
    """hidden, weight, bias, targets: every third row is ignored."""
    hidden = torch.randn(*rows, width).to(dtype)
    weight = torch.randn(vocab, width).to(dtype)
    targets = torch.randint(0, vocab, rows)
    targets.reshape(-1)[1::3] = IGNORED
    return hidden, weight, torch.randn(vocab).to(dtype), targets


def run(inputs: Inputs, **options) -> list[Tensor]:
    """[logprob, entropy, gradient of hidden, of weight, of bias]."""
    hidden, weight, bias = (leaf(x) for x in inputs[:3])
    outputs = linear_logprob(hidden, weight, inputs[3], bias=bias, **options)
    return [o.detach() for o in outputs] + gradients(outputs, [hidden, weight, bias])


def run_formula(inputs: Inputs, temperature: float, dtype: torch.dtype) -> list[Tensor]:
    """As run, by torch in `dtype`, with all logits at once."""
    leaves = [leaf(x) for x in inputs[:3]]
    skip = inputs[3] == IGNORED
    hidden = leaves[0].to(dtype).masked_fill(skip[..., None], 0.0)
    logits = hidden @ leaves[1].to(dtype).t() + leaves[2].to(dtype)
    outputs = logprob_formula(logits, inputs[3], temperature)
    return [o.detach() for o in outputs] + gradients(outputs, leaves)


def assert_good(inputs: Inputs, temperature: float = 1.0, **options) -> None:
    ours = run(inputs, temperature=temperature, **options)
    torchs = run_formula(inputs, temperature, torch.float32)
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    exact = run_formula(wide, temperature, torch.float64)  # type: ignore[arg-type]
    names = ("logprob", "entropy", "hidden.grad", "weight.grad", "bias.grad")
    for name, a, b, c in zip(names, ours, torchs, exact, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert_as_good_as_torch(a, b, c, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(backend: str, dtype: torch.dtype, shape: tuple, ran) -> None:
    assert_good(example(*quick(shape, backend), dtype=dtype), 0.7)
    assert ran("linear_logprob") == backend


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    assert_good(example((37,), 19, 2053, dtype=dtype))


@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 1000])
def test_any_chunk(backend: str, chunk_rows: int) -> None:
    assert_good(example(*quick(((67,), 12, 101), backend)), chunk_rows=chunk_rows)


def test_weight_wider_than_a_block(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 16-bit weight is widened a block at a time: 4 rows here, which do not divide 103."""
    monkeypatch.setattr("igpo.ops._products.BLOCK_BYTES", 4 * 13 * 4)
    assert_good(example((20,), 13, 103, dtype=torch.bfloat16), chunk_rows=6)


def test_logits_are_not_rounded_to_bfloat16(backend: str) -> None:
    """Logits near 20 have bfloat16 steps of 0.125; the log-probability is right to 1e-5."""
    hidden = torch.full((1, 4), 4.0, dtype=torch.bfloat16)
    weight = torch.tensor([[1.25] * 4, [1.25, 1.25, 1.25, 1.2578125]], dtype=torch.bfloat16)
    logprob, _ = linear_logprob(hidden, weight, torch.tensor([1]))
    assert logprob.item() == pytest.approx(-torch.tensor(-0.03125).exp().log1p().item(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_matmul_then_token_logprob(backend: str, dtype: torch.dtype) -> None:
    """With all rows in one chunk and a weight of one block it is the same arithmetic: on a CPU the same bits."""
    hidden, weight, _, targets = example((33,), 24, 513, dtype=dtype)
    kept = targets != IGNORED
    logits = hidden[kept].float() @ weight.float().t()
    whole = token_logprob(logits, targets[kept], temperature=0.9)
    ours = linear_logprob(hidden, weight, targets, temperature=0.9, chunk_rows=33)
    for a, b in zip(ours, whole, strict=True):
        if a.device.type == "cpu":
            assert torch.equal(a[kept], b)
        torch.testing.assert_close(a[kept], b, rtol=1e-5, atol=1e-5)


def test_threads(threads: int) -> None:
    """The products are torch's, which may differ in the last bits with the number of threads."""
    inputs = example((70,), 33, 1031)
    together = run(inputs)
    torch.set_num_threads(1)
    for a, b in zip(together, run(inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_ignored_rows_are_zero_whatever_they_hold(backend: str) -> None:
    inputs = example((5, 4), 6, 29)
    clean = run(inputs)
    skip = inputs[3] == IGNORED
    inputs[0][skip] = torch.nan
    poisoned = run(inputs)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))
    assert not any(x[skip].any() for x in poisoned[:3])
    all_ignored = run((*inputs[:3], torch.full_like(inputs[3], IGNORED)))
    assert not any(x.any() for x in all_ignored)


def test_ignore_index_may_be_a_token(backend: str) -> None:
    hidden, weight, _, _ = example((3,), 4, 8)
    logprob, entropy = linear_logprob(hidden, weight, torch.tensor([2, 0, 1]), ignore_index=0)
    assert [x == 0 for x in logprob.tolist()] == [False, True, False]
    assert entropy[1] == 0


def test_suppressed_tokens_and_nan_rows(backend: str) -> None:
    """A bias of -inf suppresses a token; NaN in a row of hidden stays in that row."""
    hidden, weight, bias, _ = example((4,), 5, 11)
    bias[3] = -torch.inf
    hidden[2] = torch.nan
    targets = torch.tensor([1, 3, 0, 2])
    logprob, entropy, of_hidden, *_ = run((hidden, weight, bias, targets))
    assert logprob.isfinite().tolist() == [True, False, False, True]
    assert logprob[1] == -torch.inf
    assert logprob[2].isnan()
    assert (
        entropy.isnan().tolist()
        == of_hidden.isnan().any(-1).tolist()
        == [False, False, True, False]
    )
    truth = run_formula(
        tuple(x.double() if x.is_floating_point() else x for x in (hidden, weight, bias, targets)),  # type: ignore[arg-type]
        1.0, torch.float64,
    )  # fmt: skip
    torch.testing.assert_close(of_hidden.double(), truth[2], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_strides_and_views(backend: str) -> None:
    """hidden with gaps between rows and permuted, weight transposed, everything expanded."""
    hidden, weight, bias, targets = example((4, 6), 10, 23)
    wide = torch.randn(4, 6, 13)
    wide[..., :10] = hidden
    views: list[Inputs] = [
        (wide[..., :10], weight.t().contiguous().t(), bias, targets),
        (hidden.transpose(0, 1), weight, bias, targets.t()),
        (hidden[:1].expand(4, 6, 10), weight, bias[:1].expand(23), targets),
    ]
    for inputs in views:
        before = [x.clone() for x in inputs]
        dense = run(tuple(x.contiguous() for x in inputs))  # type: ignore[arg-type]
        for a, b in zip(run(inputs), dense, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_gradient_flows_through_views(backend: str) -> None:
    one, (_, weight, _, _) = leaf(torch.randn(1, 7)), example((1,), 7, 13)
    targets = torch.arange(6).view(2, 3)
    outputs = linear_logprob(one.expand(6, 7).view(2, 3, 7), weight, targets)
    exact = leaf(one.double())
    logits = exact.expand(6, 7).view(2, 3, 7) @ weight.double().t()
    (truth,) = gradients(logprob_formula(logits, targets), [exact])
    torch.testing.assert_close(gradients(outputs, [one])[0].double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_only_the_gradients_needed(backend: str, needs: tuple[int, int, int]) -> None:
    inputs = example((9,), 6, 21)
    whole = run(inputs)[2:]
    tensors = [x.clone().requires_grad_(bool(n)) for x, n in zip(inputs[:3], needs, strict=True)]
    outputs = linear_logprob(tensors[0], tensors[1], inputs[3], bias=tensors[2])
    some = gradients(outputs, [x for x in tensors if x.requires_grad])
    assert all(
        torch.equal(a, b)
        for a, b in zip(some, (g for g, n in zip(whole, needs, strict=True) if n), strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_left_in_change_nothing(backend: str, dtype: torch.dtype) -> None:
    """The form for CUDA graphs computes the rows that do not count and drops them. Logits are integers, so exact."""
    hidden, weight = (
        torch.randint(-3, 4, (67, 8)).to(dtype),
        torch.randint(-3, 4, (101, 8)).to(dtype),
    )
    targets = torch.randint(0, 101, (67,))
    targets[::3] = IGNORED
    hidden[::3] = torch.nan
    found = []
    for compact in (True, False):
        leaves = [leaf(hidden), leaf(weight)]
        options = (None, 0.7, IGNORED, 5, compact)
        outputs = torch.ops.igpo.linear_logprob(*leaves, targets, *options)[:2]
        found.append([x.detach() for x in outputs] + gradients(outputs, leaves))
    (*outputs, of_hidden, of_weight), (*dropped, also_of_hidden, also_of_weight) = found
    assert all(torch.equal(a, b) for a, b in zip(outputs, dropped, strict=True))
    assert not also_of_hidden[::3].any()
    torch.testing.assert_close(of_hidden, also_of_hidden)
    torch.testing.assert_close(of_weight, also_of_weight)  # the sums over chunks are cut elsewhere


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpoint(backend: str, reentrant: bool) -> None:
    inputs = example((9,), 6, 21)
    tensors = [leaf(x) for x in inputs[:3]]

    def forward(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logprob, entropy = linear_logprob(hidden, weight, inputs[3], bias=bias)
        return logprob.sum() - 0.3 * entropy.square().sum()

    plain = torch.autograd.grad(forward(*tensors), tensors)
    checkpoint(forward, *tensors, use_reentrant=reentrant).backward()  # type: ignore[union-attr]
    assert all(torch.equal(a, x.grad) for a, x in zip(plain, tensors, strict=True))


def test_small_gradients_survive_float16(backend: str) -> None:
    """A flat row over 20000 tokens has probabilities below float16's smallest normal number."""
    hidden, weight = torch.randn(3, 4).half() / 64, torch.randn(20011, 4).half()
    targets = torch.tensor([5, 6, 7])

    def gradient(x: Tensor) -> Tensor:
        logprob, _ = linear_logprob(x, weight.to(x.dtype), targets, chunk_rows=2)
        return torch.autograd.grad(logprob.sum() * 1e-3, x)[0]

    with use_backend("reference"):
        exact = gradient(leaf(hidden.double()))
    torch.testing.assert_close(gradient(leaf(hidden)).double(), exact, rtol=1e-3, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory(backend: str, dtype: torch.dtype) -> None:
    """A frozen head: forward and backward hold an eighth of the float32 logits, and no weight gradient."""
    width, (rows, vocab, chunk_rows) = 32, memory_sizes(backend)
    hidden, weight, _, targets = example((rows,), width, vocab, dtype=dtype)
    targets = targets.clamp(min=0)
    hidden = leaf(hidden)

    def step() -> None:
        logprob, entropy = linear_logprob(hidden, weight, targets, chunk_rows=chunk_rows)
        torch.autograd.grad(logprob.sum() + entropy.sum(), hidden)

    eighth = rows * vocab * 4 / 8
    # the reference makes temporaries of a chunk, Triton's interpreter copies of its arguments
    times = 6 if backend == "reference" else 2 if backend == "triton" else 1
    assert peak_bytes(step) <= eighth * times


def test_gradcheck() -> None:
    inputs = [x.double() if x.is_floating_point() else x for x in example((5,), 3, 6)]
    leaves = [leaf(x) for x in inputs[:3]]
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprob(h, w, inputs[3], bias=b, temperature=0.8, chunk_rows=2),
        leaves,
    )


def test_second_derivatives_are_refused(backend: str) -> None:
    hidden, weight, _, targets = example((2,), 3, 4)
    hidden = leaf(hidden)
    (grad,) = gradients(linear_logprob(hidden, weight, targets), [hidden])
    assert not grad.requires_grad
    logprob, _ = linear_logprob(hidden, weight, targets)
    (grad,) = torch.autograd.grad(logprob.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprob: second derivatives are not implement"):
        grad.sum().backward()


def test_opcheck(backend: str) -> None:
    hidden, weight, bias, targets = example((3, 2), 4, 11)
    op, options = torch.ops.igpo.linear_logprob.default, (0.7, IGNORED, 2, True)
    for b in (bias, None):
        torch.library.opcheck(op, (leaf(hidden), leaf(weight), targets, b, *options))
    logprob, *stats = op(hidden, weight, targets, bias, *options)
    backward = torch.ops.igpo.linear_logprob_backward.default
    for needs in ([True, True, True], [True, False, False]):
        args = (logprob, logprob, hidden, weight, targets, bias, *stats, *options, needs)
        torch.library.opcheck(backward, args)


def test_compiles(backend: str) -> None:
    hidden, weight, bias, targets = example((5,), 7, 37)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        logprob, entropy = linear_logprob(h * 2, w, targets, bias=bias, temperature=0.5)
        return logprob.sum() - 0.1 * entropy.sum()

    a, b = [leaf(hidden), leaf(weight)], [leaf(hidden), leaf(weight)]
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*a).backward()
    loss(*b).backward()
    for x, y in zip(a, b, strict=True):  # on a GPU compiled code computes all rows
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)


def test_autocast_does_not_narrow(backend: str) -> None:
    inputs = example((5,), 64, 33)
    plain = run(inputs)
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        under = run(inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


def test_refuses_sharded_tensors(tmp_path: Path) -> None:
    """One process of a group of one: a DTensor must be gathered, or its local part taken, by the caller."""
    distributed = pytest.importorskip("torch.distributed.tensor")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        weight = distributed.distribute_tensor(torch.zeros(3, 2), mesh, [distributed.Shard(0)])
        with pytest.raises(
            ValueError, match=r"weight must be a local tensor.*full_tensor\(\).*to_l"
        ):
            linear_logprob(torch.zeros(1, 2), weight, torch.tensor([0]))
    finally:
        torch.distributed.destroy_process_group()


def test_cpu_kernels_refuse_float64() -> None:
    hidden, weight = torch.zeros(1, 2).double(), torch.zeros(3, 2).double()
    with use_backend("cpu"), pytest.raises(BackendError, match="bfloat16 and float16, not float64"):
        linear_logprob(hidden, weight, torch.tensor([0]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": None}, TypeError, "linear_logprob: hidden must be a tensor, got NoneType"),
        ({"hidden": torch.zeros(4, 2).t()}, ValueError, "hidden must have a contiguous last dim"),
        ({"weight": torch.zeros(3, 4).half()}, ValueError, "weight must be float32, got .*float16"),
        ({"weight": torch.zeros(3, 5)}, ValueError, r"shape \(V, 4\) with V > 0, got shape \(3, 5"),
        ({"weight": torch.zeros(0, 4)}, ValueError, r"weight must have shape \(V, 4\) with V > 0"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must have shape \(V, 4\) with V > 0"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(3,\), got shape \(4,\)"),
        ({"targets": torch.zeros(3).long()}, ValueError, r"targets must have shape \(2,\), got sh"),
        ({"targets": torch.zeros(2)}, ValueError, "targets must be int64, got shape .*float32"),
        (
            {"targets": torch.tensor([0, 3])},
            ValueError,
            r"be in \[0, 3\) or ignore_.*, got 3\. Set",
        ),
        ({"temperature": -1.0}, ValueError, "temperature must be > 0 and finite, got -1.0"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be None or > 0, got 0"),
    ],
)
def test_rejects_bad_input(change: dict, error: type[Exception], message: str) -> None:
    good = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(3, 4),
        "targets": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(error, match=message):
        linear_logprob(**(good | change))
