"""The rivals of the linear_* ops: the same row op on logits that are held whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Case, close, compiled, measure, peak_mib
from torch import Tensor

ROWS, WIDTH = 512, 256


def inputs(vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(ROWS, WIDTH).to(dtype)
    weight = (torch.randn(vocabulary, WIDTH) * 0.2).to(dtype)
    return hidden, weight, torch.randint(0, vocabulary, (ROWS,))


def full_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """float32 logits of bfloat16 inputs need float32 operands on a CPU."""
    return hidden.float() @ weight.float().t()


def run_linear(
    benchmark,
    request,
    op: str,
    functions: dict[str, Callable],
    vocabulary: int,
    dtype,
    provider: str,
    trained: bool,
) -> None:
    """functions: name -> f(hidden, weight, targets) -> outputs to differentiate; "unfused" is matmul + our op.
    trained: whether the weight requires a gradient (under LoRA it does not)."""
    hidden, weight, targets = inputs(vocabulary, dtype)
    if provider == "compile":
        functions = functions | {"compile": compiled(functions["eager"], request)}

    def call(name: str) -> tuple[Tensor, ...]:
        inputs = hidden.detach().requires_grad_(), weight.detach().requires_grad_(trained)
        leaves = inputs if trained else inputs[:1]
        outputs = functions[name](*inputs, targets)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = torch.stack([x.float().sum() for x in outputs]).sum()
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    truth = call("eager")
    logits_mib = ROWS * vocabulary * 4 / 2**20
    measured = provider == "igpo" or not benchmark.disabled
    gradients_mib = sum(x.numel() * x.element_size() for x in truth[1:]) / 2**20
    gate_rtol, gate_atol = (3e-2, 3e-1) if dtype == torch.bfloat16 else (1e-3, 2e-3)
    case = Case(
        name=f"{op} fwd+bwd {'trained' if trained else 'frozen'} {ROWS}x{WIDTH}x{vocabulary} {dtype}".replace(
            "torch.", ""
        ),
        providers={name: lambda name=name: call(name) for name in functions},
        gate=lambda result: close(result, truth, rtol=gate_rtol, atol=gate_atol),
        bytes=(3 if trained else 2) * weight.numel() * weight.element_size(),
        counted="the head's weight read twice and its gradient, if any, written once; compute-bound: "
        "4*N*D*V FLOP, and 2*N*D*V more for the gradient of the weight",
        facts={
            "peak_mib": peak_mib(lambda: call(provider)) if measured else None,
            "of_which_results_mib": gradients_mib,
            "full_float32_logits_mib": logits_mib,
        },
    )
    measure(benchmark, case, provider)
