from __future__ import annotations

import itertools
import math

import pytest
import torch
from gpu import is_slow, on_cpu_tensors
from gpu_checks import check_everywhere
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo.ops import policy_loss, use_backend
from igpo.ops.policy_loss import AGGREGATES, KLS, RATIOS


def example(rows: int, length: int, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    old = -torch.rand(rows, length, dtype=dtype) * 3
    logprob = old + torch.randn(rows, length, dtype=dtype) * 0.3
    ref = old + torch.randn(rows, length, dtype=dtype) * 0.3
    return logprob, old, torch.randn(rows, dtype=dtype), torch.rand(rows, length) < 0.7, ref


def definition(
    logprob, old, advantages, mask, ref, clip, ratio, kl_coef, kl, aggregate
) -> torch.Tensor:
    """The loss one token at a time, in Python."""
    rows, length = logprob.shape
    total, tokens, by_row = logprob.new_zeros(()), int(mask.sum()), []
    for b in range(rows):
        here = [i for i in range(length) if mask[b, i]]
        row = logprob.new_zeros(())
        if ratio == "sequence" and here:
            shared = torch.exp(sum(logprob[b, i] - old[b, i] for i in here) / len(here))
        for i in here:
            rho = shared if ratio == "sequence" else torch.exp(logprob[b, i] - old[b, i])
            a = advantages[b]
            term = -torch.minimum(rho * a, rho.clamp(1 - clip[0], 1 + clip[1]) * a)
            d = logprob[b, i] - ref[b, i]
            row = row + term + kl_coef * {"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) - 1 + d}[kl]
        by_row.append(row / max(1, len(here)))
        total = total + row
    if aggregate == "sequence-mean":
        return sum(by_row) / rows
    return total / {"token-mean": max(1, tokens), "sum": 1}.get(aggregate, aggregate)


GRID = list(itertools.product(RATIOS, KLS, (*AGGREGATES, 12.5)))


@pytest.mark.parametrize(("ratio", "kl", "aggregate"), GRID)
def test_matches_definition_with_gradient(
    backend: str, ratio: str, kl: str, aggregate, ran
) -> None:
    args = example(4, 6)
    args[3][1] = False
    options = {
        "clip": (0.15, 0.3),
        "ratio": ratio,
        "kl_coef": 0.2,
        "kl": kl,
        "aggregate": aggregate,
    }
    leaf = args[0].clone().requires_grad_()
    result = policy_loss(leaf, *args[1:4], ref_logprob=args[4], **options)
    result.loss.backward()
    assert ran("policy_loss") == backend
    exact = [x.double() if x.is_floating_point() else x for x in args]
    truth_leaf = exact[0].clone().requires_grad_()
    truth = definition(truth_leaf, *exact[1:], **options)
    truth.backward()
    torch.testing.assert_close(result.loss.double(), truth, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), truth_leaf.grad, rtol=2e-5, atol=1e-6)


def loss_and_gradient(logprob: torch.Tensor, *args, **options) -> tuple[torch.Tensor, ...]:
    leaf = logprob.detach().requires_grad_()
    result = policy_loss(leaf, *args, **options)
    return *(x.detach() for x in result), *torch.autograd.grad(result.loss, leaf)


def assert_close_to_reference(*args, **options) -> None:
    found = loss_and_gradient(*args, **options)
    with use_backend("reference"):
        wide = [x.double() if x.is_floating_point() else x for x in args]
        ref = options["ref_logprob"].double()
        truth = loss_and_gradient(*wide, **(options | {"ref_logprob": ref}))
    for x, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(x.double(), exact, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (9, 33), (3, 129), (2, 1031), (1025, 4)])
@pytest.mark.parametrize(("ratio", "aggregate"), [("token", "token-mean"), ("sequence", "sum")])
def test_sizes(gpu_backend: str, shape: tuple[int, int], ratio: str, aggregate: str) -> None:
    """A warp to a row and a block to a row, one launch and several, tails of every kind."""
    if is_slow(gpu_backend) and gpu_backend == "triton":
        shape = min(shape[0], 3), shape[1]
    logprob, old, advantages, mask, ref = example(*shape)
    options = {"ratio": ratio, "aggregate": aggregate, "kl_coef": 0.1, "ref_logprob": ref}
    assert_close_to_reference(logprob, old, advantages, mask, **options)


@pytest.mark.parametrize("ratio", RATIOS)
def test_strides_and_alignment(gpu_backend: str, ratio: str) -> None:
    """Rows cut out of longer ones, columns apart, one advantage for all, masks 1 byte off."""
    logprob, old, advantages, mask, ref = example(4, 41)
    options = {"ratio": ratio, "kl_coef": 0.1, "kl": "k2", "aggregate": "sequence-mean"}
    views = (
        logprob[:, 3:40],
        old[:, 4:].t().contiguous().t(),
        advantages[:1].expand(4),
        mask[:, 1:38],
    )
    assert_close_to_reference(*views, ref_logprob=ref[:1, 2:39].expand(4, 37), **options)


@pytest.mark.parametrize("aggregate", [*AGGREGATES, 3.0])
@pytest.mark.parametrize("ratio", RATIOS)
def test_clusters_and_order_of_threads_do_not_change_a_bit(
    ratio: str, aggregate: str | float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch of a cluster, or two or three without clusters; both on the emulator."""
    if "cuda" not in on_cpu_tensors():
        pytest.skip("the kernels run on a GPU here")
    for shape in ((70, 13), (3, 600)):
        logprob, old, advantages, mask, ref = example(*shape)
        options = {"ref_logprob": ref, "kl_coef": 0.1, "ratio": ratio, "aggregate": aggregate}
        found = []
        for capability, order in itertools.product(("90", "80"), ("forward", "reverse")):
            monkeypatch.setenv("IGPO_EMULATE_CAPABILITY", capability)
            monkeypatch.setenv("IGPO_EMULATE_ORDER", order)
            with use_backend("cuda"):
                found.append(loss_and_gradient(logprob, old, advantages, mask, **options))
        assert all(all(map(torch.equal, x, found[0])) for x in found[1:])


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_row_does_not_depend_on_its_neighbours(gpu_backend: str, ratio: str) -> None:
    logprob, old, advantages, mask, _ = example(5, 39)  # rows at every alignment
    whole = loss_and_gradient(logprob, old, advantages, mask, ratio=ratio, aggregate="sum")[-1]
    for row in (1, 3):
        one = (x[row : row + 1].clone() for x in (logprob, old, advantages, mask))
        alone = loss_and_gradient(*one, ratio=ratio, aggregate="sum")[-1]
        assert torch.equal(alone[0], whole[row])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 256), (300, 700)])
def test_streams_graphs_and_devices(gpu_backend: str, shape: tuple[int, int]) -> None:
    def run(logprob, old, advantages, mask, ref):
        return policy_loss(logprob, old, advantages, mask, ref_logprob=ref, kl_coef=0.1)

    check_everywhere(run, example(*shape), example(*shape))


@pytest.mark.gpu
def test_one_launch(gpu_backend: str) -> None:
    """At 64 x 256, with the gradient: one kernel in CUDA; no copy and no wait in either."""
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    logprob, old, advantages, mask, ref = (x.cuda() for x in example(64, 256))
    options = {"ref_logprob": ref, "kl_coef": 0.1, "ratio": "sequence"}
    policy_loss(logprob, old, advantages, mask, **options)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        policy_loss(logprob, old, advantages, mask, **options)
        torch.cuda.synchronize()
    on_device = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    has_clusters = torch.cuda.get_device_capability() >= (9, 0)
    most = 1 if gpu_backend == "cuda" and has_clusters else 3
    assert len(on_device) <= most, [e.name for e in on_device]
    assert not any("Memcpy" in e.name for e in on_device)


@pytest.mark.parametrize(("ratio", "kl"), list(itertools.product(RATIOS, KLS)))
def test_gradcheck(ratio: str, kl: str) -> None:
    logprob, old, advantages, mask, ref = example(3, 5, torch.float64)
    options = {"ratio": ratio, "ref_logprob": ref, "kl_coef": 0.3, "kl": kl, "clip": (0.2, 0.28)}
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old, advantages, mask, **options).loss, logprob.requires_grad_()
    )


@pytest.mark.parametrize("ratio", RATIOS)
def test_on_policy_ratio_is_exactly_one(backend: str, ratio: str) -> None:
    logprob, _, advantages, mask, _ = example(5, 7)
    mask[:, 0] = True
    result = policy_loss(
        logprob, logprob.clone(), advantages, mask, ratio=ratio, aggregate="sequence-mean"
    )
    assert result.ratio_mean == 1.0
    assert result.clip_fraction == 0.0
    torch.testing.assert_close(result.loss, -advantages.mean())


def test_golden_values(backend: str) -> None:
    """k3(0.1) = 0.0048374, k2(0.1) = 0.005; the GSPO ratio of log-differences [.4, 0, 0, -.2] is 1.05127."""
    zero, one = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    for kl, value in (("k1", 0.1), ("k2", 0.005), ("k3", 0.0048374)):
        result = policy_loss(
            zero + 0.1, zero + 0.1, torch.zeros(1), one, ref_logprob=zero, kl_coef=1.0, kl=kl
        )
        assert result.kl.item() == pytest.approx(value, abs=1e-7)
        assert result.loss.item() == pytest.approx(value, abs=1e-7)
    differences = torch.tensor([[0.4, 0.0, 0.0, -0.2]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    result = policy_loss(differences, torch.zeros(1, 4), torch.ones(1), mask, ratio="sequence")
    assert result.ratio_mean.item() == pytest.approx(1.05127, abs=1e-5)
    assert result.loss.item() == pytest.approx(-1.05127, abs=1e-5)


def test_clipping_stops_the_gradient(backend: str) -> None:
    old, mask = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
    leaf = torch.tensor([[0.5, 0.1, -0.1, -0.5]], requires_grad=True)
    for advantage, stopped in ((1.0, [0]), (-1.0, [3])):
        leaf.grad = None
        result = policy_loss(leaf, old, torch.tensor([advantage]), mask, clip=(0.2, 0.2))
        result.loss.backward()
        assert [i for i in range(4) if leaf.grad[0, i] == 0] == stopped
        assert result.clip_fraction == 0.25


@pytest.mark.parametrize("ratio", RATIOS)
def test_masked_tokens_do_not_leak(backend: str, ratio: str) -> None:
    logprob, old, advantages, mask, ref = example(4, 9)
    mask[2] = False
    clean = policy_loss(logprob, old, advantages, mask, ratio=ratio, ref_logprob=ref, kl_coef=0.1)
    poisoned = [
        torch.where(mask, x, torch.nan).requires_grad_(i == 0)
        for i, x in enumerate((logprob, old, ref))
    ]
    result = policy_loss(
        poisoned[0],
        poisoned[1],
        advantages,
        mask,
        ratio=ratio,
        ref_logprob=poisoned[2],
        kl_coef=0.1,
    )
    assert torch.equal(torch.stack(result), torch.stack(clean))
    result.loss.backward()
    assert torch.equal(poisoned[0].grad[~mask], torch.zeros(int((~mask).sum())))
    assert poisoned[0].grad.isfinite().all()


def test_extreme_log_ratios_stay_finite(backend: str) -> None:
    leaf = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    zero, mask = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    for advantage in (-1.0, 1.0):
        result = policy_loss(
            leaf, zero, torch.tensor([advantage]), mask, ref_logprob=zero, kl_coef=0.1
        )
        (grad,) = torch.autograd.grad(result.loss, leaf)
        assert result.loss.isfinite()
        assert grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
def test_empty(backend: str, shape: tuple[int, int]) -> None:
    leaf = torch.zeros(shape, requires_grad=True)
    result = policy_loss(
        leaf, torch.zeros(shape), torch.zeros(shape[0]), torch.zeros(shape, dtype=torch.bool)
    )
    result.loss.backward()
    assert torch.stack(result).tolist() == [0.0] * 4
    assert leaf.grad.shape == shape


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 40), st.sampled_from(RATIOS), st.sampled_from(AGGREGATES))
def test_zero_advantages_give_zero_gradient(
    rows: int, length: int, ratio: str, aggregate: str
) -> None:
    logprob, old, _, mask, _ = example(rows, length)
    for name in on_cpu_tensors():
        leaf = logprob.clone().requires_grad_()
        with use_backend(name):
            policy_loss(
                leaf, old, torch.zeros(rows), mask, ratio=ratio, aggregate=aggregate
            ).loss.backward()
        assert not leaf.grad.any()


def test_threads_and_instruction_sets(isa: str, threads: int) -> None:
    logprob, old, advantages, mask, ref = (
        x.t().contiguous().t() if x.dim() == 2 else x for x in example(67, 131)
    )
    leaf = logprob.clone().requires_grad_()
    options = {"ref_logprob": ref, "kl_coef": 0.05, "ratio": "sequence"}
    result = policy_loss(leaf, old, advantages, mask, **options)
    result.loss.backward()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    again = logprob.clone().requires_grad_()
    single = policy_loss(again, old, advantages, mask, **options)
    single.loss.backward()
    torch.set_num_threads(before)
    assert torch.equal(torch.stack(result), torch.stack(single))
    assert torch.equal(leaf.grad, again.grad)
    with use_backend("reference"):
        torch.testing.assert_close(
            single, policy_loss(logprob, old, advantages, mask, **options), rtol=1e-5, atol=1e-6
        )


def test_compiles_and_passes_opcheck(backend: str) -> None:
    logprob, old, advantages, mask, ref = example(3, 5)
    op = torch.ops.igpo.policy_loss.default
    leaf = logprob.clone().requires_grad_()
    torch.library.opcheck(op, (leaf, old, advantages, mask, ref, 0.2, 0.2, False, 0.1, 2, 1, 1.0))

    def loss(x: torch.Tensor) -> torch.Tensor:
        return policy_loss(x, old, advantages, mask, ref_logprob=ref, kl_coef=0.1).loss

    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf).backward()
    again = logprob.clone().requires_grad_()
    loss(again).backward()
    assert torch.equal(leaf.grad, again.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"logprob": torch.zeros(2, 3).half()},
            "policy_loss: logprob must be float32 | float64, got .*float16",
        ),
        ({"logprob": torch.zeros(6)}, r"logprob must have shape \(B, L\), got shape \(6,\)"),
        (
            {"old_logprob": torch.zeros(2, 4)},
            r"old_logprob must have shape \(2, 3\), got shape \(2, 4\)",
        ),
        ({"advantages": torch.zeros(3)}, r"advantages must have shape \(2,\), got shape \(3,\)"),
        ({"token_mask": torch.ones(2, 3)}, "token_mask must be bool, got .*float32"),
        (
            {"clip": (1.5, 0.2)},
            r"clip must be \(low, high\) with 0 <= low <= 1 and high >= 0, got \(1.5, 0.2\)",
        ),
        ({"ratio": "block"}, "ratio must be one of token, sequence, got 'block'"),
        ({"kl": "k4"}, "kl must be one of k1, k2, k3, got 'k4'"),
        (
            {"kl_coef": 0.1},
            "ref_logprob must be given when kl_coef > 0, got None. Pass the reference",
        ),
        ({"kl_coef": math.inf}, "kl_coef must be >= 0 and finite, got inf"),
        (
            {"aggregate": "mean"},
            "aggregate must be one of token-mean, .* or a positive number, got 'mean'",
        ),
        ({"aggregate": 0}, "aggregate must be one of token-mean, .* or a positive number, got 0"),
    ],
)
def test_rejects_bad_input(change: dict, message: str) -> None:
    names = ("logprob", "old_logprob", "advantages", "token_mask")
    good = dict(zip(names, example(2, 3)[:4], strict=True))
    with pytest.raises(ValueError, match=message):
        policy_loss(**(good | change))
