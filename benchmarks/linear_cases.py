"""What the benchmarks of the linear_* ops share: inputs, the exact result, the bare products, and how all are run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Case, axes, measure, near, providers
from shapes import DEVICE, Head
from timing import Run
from torch import Tensor

ERROR = {torch.bfloat16: 2e-2, torch.float32: 1e-3}
COUNTED = (
    "the head's weight read once per product and its gradient, if any, written; bound by arithmetic: "
    "2 N D V FLOP each for the logits, the gradient of hidden, and that of a trained head; N: rows that count"
)


def inputs(head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, targets: logits of standard deviation 3, as a trained model's."""
    hidden = torch.randn(head.rows, head.width, device=DEVICE).to(head.dtype)
    weight = torch.randn(head.vocabulary, head.width, device=DEVICE) * (3 / head.width**0.5)
    targets = torch.randint(0, head.vocabulary, (head.rows,), device=DEVICE)
    targets[: int(head.rows * head.ignored)] = -100
    return hidden, weight.to(head.dtype), targets


def full_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """float32 logits. On a GPU the product of 16-bit matrices is 16-bit first, as in every trainer; a CPU widens."""
    if hidden.device.type == "cuda":
        return (hidden @ weight.t()).float()
    return exact_logits(hidden, weight)


def exact_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.float() @ weight.float().t()


def products(hidden: Tensor, weight: Tensor, trained: bool) -> Callable[[], object]:
    """The matrix products that no algorithm avoids, in the library's own speed: what a fused op is held against."""
    gradient = torch.randn(len(hidden), len(weight), device=hidden.device).to(hidden.dtype)

    def run() -> list[Tensor]:
        both = [hidden @ weight.t(), gradient @ weight]
        return [*both, gradient.t() @ hidden] if trained else both

    return run


def run_linear(
    benchmark, request, op: str, functions: dict[str, Callable], truth: Callable, head: Head
) -> None:
    """functions: name -> f(hidden, weight, targets) -> outputs to differentiate, "unfused" is a matmul and our row op;
    truth: the same from exact_logits."""
    hidden, weight, targets = inputs(head)
    counted = int((targets != -100).sum())

    def call(function) -> tuple[Tensor, ...]:
        leaves = [
            hidden.detach().requires_grad_(),
            weight.detach().requires_grad_(head.trained),
        ]
        outputs = function(*leaves, targets)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = torch.stack([x.float().sum() for x in outputs]).sum()
        wanted = leaves if head.trained else leaves[:1]
        return (loss.detach(), *torch.autograd.grad(loss, wanted))

    right = call(truth)
    found, skipped = providers(op, request, functions, call, kind=op, rows=head.rows)
    found["products"] = Run(products(hidden[:counted], weight, head.trained))
    measure(
        benchmark,
        Case(
            op=op,
            axes=axes(head) | {"width": head.width},
            providers=found,
            gate=lambda result: near(result, right, error=ERROR[head.dtype]),
            bytes=(3 if head.trained else 2) * weight.numel() * weight.element_size(),
            counted=COUNTED,
            flops=(3 if head.trained else 2) * 2 * counted * weight.numel(),
            bound="matmul",
            dtype=head.dtype,
            ungated=frozenset({"products"}),
            skipped=skipped,
        ),
    )
