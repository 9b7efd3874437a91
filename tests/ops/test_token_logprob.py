from __future__ import annotations

import math

import gpu_rows
import pytest
import torch
from gpu import on_backend
from gpu_rows import emulated, launcher, same
from row_cases import DTYPES, IGNORED, example, gradients, leaf, logprob_formula
from tolerances import assert_as_good_as_torch
from torch import Tensor

from igpo.ops import BackendError, _rows, token_logprob, use_backend

# row shapes and vocabularies: none, one, primes, around vectors (16, 32, 64), tiles (2048) and slices (16384)
SHAPES = [(0, 5), (1, 1), (7, 1), (3, 5, 2), (13, 31), (0, 3, 9), (5, 67), (3, 2049), (2, 16385)]


def run(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, entropy, gradient of logits)."""
    x = leaf(logits)
    outputs = token_logprob(x, targets, temperature=temperature)
    return *(o.detach() for o in outputs), *gradients(outputs, [x])


def run_formula(
    logits: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As run, by torch in `dtype`; the gradient arrives in the dtype of logits."""
    x = leaf(logits)
    outputs = logprob_formula(x.to(dtype), targets, temperature)
    return *(o.detach() for o in outputs), *gradients(outputs, [x])


def assert_good(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> None:
    ours = run(logits, targets, temperature)
    torchs = run_formula(logits, targets, temperature, torch.float32)
    exact = run_formula(logits.double(), targets, temperature, torch.float64)
    for name, a, b, c in zip(("logprob", "entropy", "gradient"), ours, torchs, exact, strict=True):
        assert a.dtype == b.dtype
        assert_as_good_as_torch(a, b, c, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(backend: str, dtype: torch.dtype, shape: tuple[int, ...], ran) -> None:
    logits, targets = example(*shape, dtype=dtype)
    assert_good(logits, targets, 0.7)
    assert ran("token_logprob") == backend


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 15, 65, 2047, 16401])
def test_every_instruction_set(isa: str, dtype: torch.dtype, vocab: int) -> None:
    logits, targets = example(4, vocab, dtype=dtype)
    logits[0, :: 3 if vocab > 1 else 2] = -torch.inf
    targets[0] = min(1, vocab - 1)
    assert_good(logits, targets)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 30.0])
def test_temperature(backend: str, temperature: float) -> None:
    assert_good(*example(5, 301), temperature)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 60.0])
def test_ranges(backend: str, shift: float, spread: float) -> None:
    logits, targets = example(5, 3001)
    assert_good(logits * spread + shift, targets)


def test_rising_maximum(backend: str) -> None:
    """The running maximum changes at every tile, and by so much that earlier sums vanish."""
    for slope in (1e-3, 0.05, 1.0):
        assert_good(torch.arange(20000.0)[None] * slope, torch.tensor([19999]))


def test_exponential_is_accurate(isa: str) -> None:
    """Gradients of a row are c e^t_v with one c, and e^0 is exact: their ratios show the error of the exponential."""
    t = torch.cat([torch.zeros(1), -torch.logspace(-6, math.log10(87.0), 100_000), torch.zeros(1)])
    x = leaf(t[None])
    logprob, _ = token_logprob(x, torch.tensor([len(t) - 1]))
    (grad,) = torch.autograd.grad(logprob, x, torch.full((1,), 2.0**20))  # no subnormals
    ratio = grad[0, :-1].double() / grad[0, 0].double()
    error = (ratio / t[:-1].double().exp() - 1).abs().max().item()
    assert error < (2.1e-7 if isa == "portable" else 1.8e-7) + 2**-24  # and one rounded product


def test_exponential_of_very_negative_is_zero(isa: str) -> None:
    x = leaf(torch.tensor([[0.0, -87.4, -200.0, -1e30, -torch.inf, 0.0]]))
    logprob, entropy = token_logprob(x, torch.tensor([5]))
    (grad,) = torch.autograd.grad((logprob, entropy), x, (torch.ones(1), torch.ones(1)))
    assert grad[0, 1:5].tolist() == [0.0] * 4
    assert entropy.item() == pytest.approx(math.log(2), abs=1e-6)


def test_special_rows(backend: str) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [
            [0.0, -inf, 1.0, -inf, 2.0],  # the target is finite
            [0.0, -inf, 1.0, -inf, 2.0],  # the target is -inf
            [0.0, nan, 1.0, 2.0, 3.0],
            [0.0, inf, 1.0, 2.0, 3.0],
            [-inf] * 5,
            [-inf, -inf, -inf, nan, -inf],
            [-inf, -inf, 5.0, -inf, -inf],  # all on one token
        ]
    )
    targets = torch.tensor([2, 3, 0, 0, 0, 0, 2])
    logprob, entropy, grad = run(logits, targets)
    truth = run_formula(logits.double(), targets, 1.0, torch.float64)
    for ours, exact in zip(
        (logprob[:2], entropy[:2], grad[:2]), (x[:2] for x in truth), strict=True
    ):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    assert logprob[1] == -inf
    assert grad[:2].isfinite().all()
    assert grad[0, 1] == 0
    assert logprob[2:6].isnan().all()
    assert entropy[2:6].isnan().all()
    assert grad[2:6].isnan().all()
    assert (logprob[6], entropy[6]) == (0.0, 0.0)
    assert grad[6].tolist() == [0.0] * 5


@pytest.mark.parametrize("vocab", [5, 40000])
def test_special_values_anywhere_in_a_row(isa: str, vocab: int) -> None:
    for value in (torch.nan, torch.inf):
        for at in (0, vocab // 2, vocab - 1):
            logits, _ = example(2, vocab)
            logits[0, at] = value
            logprob, entropy, grad = run(logits, torch.tensor([1, 1]))
            assert logprob.isnan().tolist() == entropy.isnan().tolist() == [True, False]
            assert grad[0].isnan().all()
            assert grad[1].isfinite().all()


@pytest.mark.parametrize(("dtype", "vocab"), list(zip(DTYPES, (17000, 67, 11), strict=True)))
def test_ignored_rows_are_zero_whatever_they_hold(
    backend: str, dtype: torch.dtype, vocab: int
) -> None:
    logits, targets = example(4, vocab, dtype=dtype)
    logits[1] = torch.nan
    logprob, entropy, grad = run(logits, targets)
    assert (logprob[1], entropy[1]) == (0.0, 0.0)
    assert not grad[1].any()
    assert grad[0].any()
    all_ignored = run(torch.full_like(logits, torch.nan), torch.full((4,), IGNORED))
    assert not any(x.any() for x in all_ignored)


def test_ignore_index_may_be_a_token(backend: str) -> None:
    logits, _ = example(3, 8)
    logprob, entropy = token_logprob(logits, torch.tensor([2, 0, 1]), ignore_index=0)
    assert [x == 0 for x in logprob.tolist()] == [False, True, False]
    assert entropy[1] == 0


@pytest.mark.parametrize("vocab", [1, 2101])
def test_any_strides_of_the_rows(backend: str, vocab: int) -> None:
    wide, targets = example(3, 4, vocab + 5)
    targets = targets.clamp(max=vocab - 1)
    views = [
        (wide[..., 2 : 2 + vocab], targets),
        (wide[::2, 1:, :vocab], targets[::2, 1:]),
        (wide.transpose(0, 1)[..., :vocab], targets.t()),
        (wide[:1, :, :vocab].expand(3, 4, vocab), targets),
        (wide[0, 0, :vocab], torch.tensor(0)),
    ]
    for logits, chosen in views:
        before = logits.clone()
        ours = run(logits, chosen, 0.9)
        assert same(ours, run(logits.contiguous(), chosen.contiguous(), 0.9))
        assert torch.equal(logits, before)


def test_gradient_flows_through_views(backend: str) -> None:
    one = leaf(torch.randn(1, 33))
    targets = torch.arange(6).view(2, 3)
    outputs = token_logprob(one.expand(6, 33).view(2, 3, 33), targets)
    (grad,) = gradients(outputs, [one])
    exact = leaf(one.double())
    (truth,) = gradients(logprob_formula(exact.expand(6, 33).view(2, 3, 33), targets), [exact])
    torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=1e-6)


def test_one_output_alone_has_the_right_gradient(backend: str) -> None:
    logits, targets = example(4, 50)
    for which in (0, 1):
        x, exact = leaf(logits), leaf(logits.double())
        (grad,) = gradients((token_logprob(x, targets)[which],), [x])
        (truth,) = gradients((logprob_formula(exact, targets)[which],), [exact])
        torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "vocab"), [(2, 40001), (301, 53), (17, 20011)])
def test_threads_do_not_change_a_bit(isa: str, threads: int, rows: int, vocab: int) -> None:
    logits, targets = example(rows, vocab)
    together = run(logits, targets)
    torch.set_num_threads(1)
    assert same(together, run(logits, targets))
    torch.set_num_threads(threads)
    with torch.no_grad():
        alone = token_logprob(logits[-1], targets[-1])
    assert same(tuple(x[-1] for x in together[:2]), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [700, 2049, 17001])
def test_rows_do_not_depend_on_their_batch(
    gpu_backend: str, dtype: torch.dtype, vocab: int
) -> None:
    gpu_rows.assert_rows_do_not_depend_on_their_batch(row_run, *example(3, vocab, dtype=dtype))


def row_run(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """As run, with an upstream gradient that does not depend on the number of rows."""
    x = leaf(logits)
    outputs = token_logprob(x, targets, temperature=0.8)
    upstream = [torch.full_like(o, 1.5) for o in outputs]
    return *(o.detach() for o in outputs), *torch.autograd.grad(outputs, [x], upstream)


@pytest.mark.parametrize(("dtype", "vocab"), list(zip(DTYPES, (17001, 16392, 1033), strict=True)))
def test_cuda_is_the_same_everywhere(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, vocab: int
) -> None:
    with on_backend("cuda", "token_logprob"):
        gpu_rows.assert_cuda_is_the_same_everywhere(row_run, monkeypatch, vocab, dtype)


@pytest.mark.parametrize("vocab", [1024, 20480])
def test_skipped_rows_are_not_read(backend: str, vocab: int) -> None:
    if not emulated(backend) and backend != "cpu":
        pytest.skip("the reference reads all rows; a GPU does not tell")
    targets = torch.tensor([3, IGNORED, 5])
    with gpu_rows.unreadable_row(3, vocab, 1) as logits:
        logprob, entropy, grad = run(logits, targets)
    assert (logprob[1], entropy[1]) == (0.0, 0.0)
    assert not grad[1].any()
    assert grad[0].any()


def backward_arguments(logits: Tensor, targets: Tensor, backend: str) -> tuple:
    logprob, *stats = launcher("token_logprob", backend, "forward")(logits, targets, 0.7, IGNORED)
    ones = torch.ones_like(logprob)
    return ones, ones * 0.3, logits, targets, *stats, 0.7, IGNORED


@pytest.mark.parametrize(("dtype", "vocab"), list(zip(DTYPES, (16401, 67, 1100), strict=True)))
def test_gradient_goes_where_it_is_told(gpu_backend: str, dtype: torch.dtype, vocab: int) -> None:
    """Into rows of another stride, with nothing written between them, and over the logits."""
    logits, targets = example(3, vocab, dtype=dtype)
    backward = launcher("token_logprob", gpu_backend, "backward")
    args = backward_arguments(logits, targets, gpu_backend)
    expected = backward(*args)
    wide = torch.full((3, vocab + 6), 7.0, dtype=dtype)
    assert backward(*args, wide[:, 3 : 3 + vocab]).data_ptr() == wide[:, 3:].data_ptr()
    assert torch.equal(wide[:, 3 : 3 + vocab], expected)
    assert (wide[:, :3] == 7).all()
    assert (wide[:, 3 + vocab :] == 7).all()
    assert torch.equal(backward(*args, logits), expected)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_float32_logits_in_16_bits(gpu_backend: str, dtype: torch.dtype) -> None:
    logits, targets = example(3, 1100)
    backward = launcher("token_logprob", gpu_backend, "backward")
    args = backward_arguments(logits, targets, gpu_backend)
    out = torch.full((3, 1100), torch.nan, dtype=dtype)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds
    error = (backward(*args, out).double() / backward(*args).double() - 1).abs().nan_to_num(0.0)
    interpreted = gpu_backend == "triton" and emulated(gpu_backend)
    normal = backward(*args).abs() >= torch.finfo(dtype).tiny
    assert error[normal].max() <= torch.finfo(dtype).eps * (1 if interpreted else 0.5)


def test_gradient_is_refused_a_wrong_place(gpu_backend: str) -> None:
    logits, targets = example(3, 8, dtype=torch.bfloat16)
    backward = launcher("token_logprob", gpu_backend, "backward")
    args = backward_arguments(logits, targets, gpu_backend)
    with pytest.raises(ValueError, match=r"token_logprob: out must be bfloat16, got .*float32"):
        backward(*args, torch.empty(3, 8))
    with pytest.raises(ValueError, match=r"out must have shape \(3, 8\), got shape \(8, 3\)"):
        backward(*args, torch.empty(8, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="out must have a contiguous last dimension"):
        backward(*args, torch.empty(8, 3, dtype=torch.bfloat16).t())


def test_a_target_that_is_no_token_gives_nan(gpu_backend: str) -> None:
    """The op cannot look for one on a GPU; nothing outside the row is read."""
    logits = torch.randn(2, 40)
    args = backward_arguments(logits, torch.tensor([40, -1]), gpu_backend)
    grad = launcher("token_logprob", gpu_backend, "backward")(*args)
    forward = launcher("token_logprob", gpu_backend, "forward")
    assert forward(logits, torch.tensor([40, -1]), 0.7, IGNORED)[0].isnan().all()
    assert grad.isnan().all()


def test_layout_is_where_the_rows_are() -> None:
    x = torch.empty(4, 3, 5, 6, 7)
    views = [
        x, x[0, 0, 0, 0], x[:, 0], x[::2, :, ::2], x[:, :, :, 0], x[:, :1], x.transpose(0, 1),
        x[:, :, 0].transpose(0, 1), x[:1, :1].expand(2, 3, 5, 6, 7), x[0, 0, 0, :1].expand(9, 7),
        x.permute(2, 0, 1, 3, 4), x[:0], x[..., :1],
    ]  # fmt: skip
    found = [_rows.layout(view) for view in views]
    for view, where in zip(views, found, strict=True):  # None: three strides or more
        if where is not None:
            inner, outer_stride, inner_stride = where
            rows = torch.arange(view.shape[:-1].numel())
            begin = rows // inner * outer_stride + rows % inner * inner_stride
            assert torch.equal(begin, _rows.offsets(view))
    assert found[:2] == [(360, 0, 7), (1, 0, 0)]
    assert _rows.laid_out(views[found.index(None)])[0].is_contiguous()


def test_three_strides(gpu_backend: str) -> None:
    logits, targets = example(2, 3, 4, 9)
    view, chosen = logits.transpose(0, 2)[:, ::2], targets.transpose(0, 2)[:, ::2]
    assert same(run(view, chosen), run(view.contiguous(), chosen.contiguous()))


@pytest.mark.gpu
def test_more_than_31_bits_of_elements(gpu_backend: str) -> None:
    gpu_rows.assert_more_than_31_bits_of_elements(row_run)


@pytest.mark.gpu
def test_graph(gpu_backend: str) -> None:
    gpu_rows.assert_runs_in_a_graph(row_run)


@pytest.mark.gpu
def test_another_stream(gpu_backend: str) -> None:
    gpu_rows.assert_runs_on_another_stream(row_run)


@pytest.mark.gpu
def test_a_device_that_is_not_current(gpu_backend: str) -> None:
    gpu_rows.assert_runs_on_a_device_that_is_not_current(row_run)


def test_gradcheck() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 5, IGNORED, 2])
    assert torch.autograd.gradcheck(lambda x: token_logprob(x, targets, temperature=0.8), logits)


def test_second_derivatives_are_refused(backend: str) -> None:
    x = leaf(torch.randn(2, 3))
    logprob, _ = token_logprob(x, torch.tensor([0, 1]))
    (grad,) = torch.autograd.grad(logprob.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="token_logprob: second derivatives are not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(backend: str, transposed: bool) -> None:
    logits, targets = example(3, 2, 11)
    if transposed:
        logits, targets = logits.transpose(0, 1), targets.t()
    x, op = leaf(logits), torch.ops.igpo.token_logprob.default
    torch.library.opcheck(op, (x, targets, 0.7, IGNORED))
    logprob, *stats = op(logits, targets, 0.7, IGNORED)
    args = (torch.ones_like(logprob), logprob, logits, targets, *stats, 0.7, IGNORED)
    torch.library.opcheck(torch.ops.igpo.token_logprob_backward.default, args)


def test_compiles(backend: str) -> None:
    logits, targets = example(5, 37)

    def loss(x: Tensor) -> Tensor:
        logprob, entropy = token_logprob(x * 2, targets, temperature=0.5)
        return logprob.sum() - 0.1 * entropy.sum()

    x, y = leaf(logits), leaf(logits)
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    loss(y).backward()
    assert torch.equal(x.grad, y.grad)


def test_cpu_kernels_refuse_float64() -> None:
    with use_backend("cpu"), pytest.raises(BackendError, match="bfloat16 and float16, not float64"):
        token_logprob(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "token_logprob: logits must be a tensor, got list"),
        ({"logits": torch.zeros(2, 3).int()}, ValueError, r"logits must be float32 \| bfloat16"),
        ({"logits": torch.zeros(())}, ValueError, "logits must have at least 1 dimensions"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "logits must have a non-empty last dimension"),
        ({"logits": torch.zeros(3, 2).t()}, ValueError, "logits must have a contiguous last .*ous"),
        ({"targets": torch.zeros(3).long()}, ValueError, r"targets must have shape \(2,\), got sh"),
        ({"targets": torch.zeros(2)}, ValueError, "targets must be int64, got shape .*float32"),
        ({"targets": torch.tensor([0, 3])}, ValueError, r"be in \[0, 3\) or ignore_.*, got 3\. Set"),
        ({"targets": torch.tensor([0, -1])}, ValueError, r"in \[0, 3\) or .*=-100, got -1"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0 and finite, got 0.0. For greedy"),
        ({"temperature": math.inf}, ValueError, "temperature must be > 0 and finite, got inf"),
    ],
)  # fmt: skip
def test_rejects_bad_input(change: dict, error: type[Exception], message: str) -> None:
    good = {"logits": torch.zeros(2, 3), "targets": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        token_logprob(**(good | change))
