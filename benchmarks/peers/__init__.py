"""Rivals from other packages, each through its public interface, imported only when asked for.

A module of this folder has `why_not(device)` (None, or the sentence that says what is missing) and functions that take
the arguments of the benchmark's own "eager" form. KINDS lists them by what they compute.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable

# kind -> provider name -> "module:function"
KINDS = {
    "token_logprob": {
        "trl": "trl:logprob_entropy",
        "liger": "liger:logprob",
    },
    "masked_cross_entropy": {
        "liger": "liger:cross_entropy",
        "quack": "quack:cross_entropy",
    },
    "linear_masked_cross_entropy": {
        "liger": "liger:linear_cross_entropy",
        "liger-cute": "liger:linear_cross_entropy_cute",
        "quack": "quack:linear_cross_entropy",
        "cce": "cce:linear_cross_entropy",
        "cce-exact": "cce:linear_cross_entropy_exact",
        "torch-lce": "torch_lce:linear_cross_entropy",
    },
    "linear_logprob": {"liger-scaled": "liger:linear_logprob", "trl-chunked": "trl:linear_logprob"},
    "grpo_on_logits": {"liger": "liger:grpo"},
    "unmask_greedy": {"quack": "quack:unmask_greedy", "flashinfer": "flashinfer:unmask"},
    "unmask_sampling": {"flashinfer": "flashinfer:unmask"},
}
# they write into the logits they are given
DESTROYS = {"masked_cross_entropy": {"liger"}}
NAMES = frozenset(name for kind in KINDS.values() for name in kind)


def find(kind: str, device: str) -> tuple[dict[str, Callable], dict[str, str]]:
    """(provider -> function, provider -> why it is not there) for a kind; "" has none."""
    found, skipped = {}, {}
    for name, place in KINDS.get(kind, {}).items():
        module_name, function = place.split(":")
        module = importlib.import_module(f"{__name__}.{module_name}")
        reason = module.why_not(device)
        if reason:
            skipped[name] = reason
        else:
            found[name] = getattr(module, function)
    return found, skipped


def missing(package: str, device: str) -> str | None:
    """Why a package of GPU kernels cannot be a rival here."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed (pip install 'igpo[peers]')"
    return None if device == "cuda" else f"{package} needs a GPU"


def failures() -> tuple[type[BaseException], ...]:
    """What a rival may raise without ending the run: Python's own errors and the compilers' it uses."""
    errors: list[type[BaseException]] = [
        ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError,
        TypeError, ValueError,
    ]  # fmt: skip
    compilers = (("triton.errors", "TritonError"), ("cutlass.base_dsl.common", "DSLBaseError"))
    for module, error in compilers:
        if module in sys.modules and hasattr(sys.modules[module], error):
            errors.append(getattr(sys.modules[module], error))
    return tuple(errors)
