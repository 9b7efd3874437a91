"""Hidden states at fixed shapes and addresses, so that a CUDA graph can launch a forward at once.

A step of a rollout is one forward and a tail of small kernels (head, draw, commit). The forward is hundreds of
launches, which a GPU outruns at small batches and with kept keys and values; replayed from a graph it is one. The tail
is launched as ever, ahead of the device, for nothing in it waits: so it needs no second form, and seed and step,
constants in a graph, may stay numbers.

The capture itself has never run on a GPU: auto leaves it alone (CHECKED). Tests run all the rest of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from igpo.types import Policy

Hidden = Callable[..., Tensor]  # tensors of equal first dimension -> a tensor of that one
Fix = Callable[
    [Hidden, Sequence[Tensor]], Hidden
]  # (function, inputs of the largest size) -> the same at fixed shapes

OPTIONS = ("auto", "on", "off")
CHECKED = ""  # the GPU the capture has been run on; auto records nothing before there is one
SIZES = 8  # graphs of a rollout at most, and the share of rows computed for nothing in a smaller batch; chosen
WARM_UP = 2  # forwards before a capture: what is set up at first use must not be recorded; chosen

logger = logging.getLogger(__name__)


class FixedShape:
    """A function of up to n rows in static memory: every call reads the same addresses, at one of SIZES shapes.

    A call copies its rows in, and rounds their number up to a multiple of n / SIZES; the rows beyond are older inputs.
    With capture, what a size launches is recorded at its first use and replayed. The result is valid until the next
    call.
    """

    def __init__(self, function: Hidden, inputs: Sequence[Tensor], *, capture: bool) -> None:
        self.function, self.capture = function, capture
        self.inputs = [x.clone() for x in inputs]
        self.unit = -(-len(self.inputs[0]) // SIZES)
        self.replays: dict[int, Callable[[], Tensor]] = {}
        self.pool: Any = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        count = len(inputs[0])
        for static, given in zip(self.inputs, inputs, strict=True):
            static[:count].copy_(given)
        size = min(-(-count // self.unit) * self.unit, len(self.inputs[0]))
        if size not in self.replays:
            own = [x[:size] for x in self.inputs]
            self.replays[size] = self._captured(own) if self.capture else self._kept(own)
        return self.replays[size]()[:count]

    def _kept(self, inputs: list[Tensor]) -> Callable[[], Tensor]:
        """The same without a graph: the result lies where it lay before."""
        kept = self.function(*inputs)

        def replay() -> Tensor:
            return kept.copy_(self.function(*inputs))

        return replay

    def _captured(self, inputs: list[Tensor]) -> Callable[[], Tensor]:
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.function(*inputs)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = self.function(*inputs)
        self.pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def why_not(policy: Policy, device: torch.device) -> str | None:
    """Why hidden states of this policy cannot be recorded, or None when they can."""
    if device.type != "cuda":
        return f"graphs are of CUDA devices, and the canvas is on {device.type}"
    attention = getattr(policy, "attention", None)
    if attention is None:
        return "the policy is not a MaskedDecoder, of which it is known what its forward launches"
    if attention != "sdpa":
        return (
            f"attn_implementation={attention} makes its masks or lengths on the host; sdpa does not"
        )
    if getattr(getattr(policy, "config", None), "num_experts", 0):
        return "a mixture of experts asks the device how many tokens each expert has"
    return None


def fixed_shapes(policy: Policy, device: torch.device, option: str) -> Fix | None:
    """How hidden states are to be recorded; None: not at all.

    option: cfg.cuda_graphs, "on"; "off"; or "auto", wherever it can be done and has been checked. On a CUDA device the
    log says once what auto chose and why.
    Raises:
        ValueError: "on" where it cannot be done, or another option.
    """
    if option not in OPTIONS:
        raise ValueError(f"denoise: cuda_graphs must be one of {', '.join(OPTIONS)}, got {option!r}.")  # fmt: skip
    if option == "off":
        return None
    reason = why_not(policy, device)
    if option == "on":
        if reason is not None:
            raise ValueError(f"denoise: cuda_graphs must be auto or off here, got 'on': {reason}.")
        return partial(FixedShape, capture=True)
    if reason is None and not CHECKED:
        reason = "this has not been checked on a GPU yet; cuda_graphs=on does it all the same"
    if device.type == "cuda":
        how = "replay the policy's forward from" if reason is None else "run without"
        _say(f"rollouts {how} CUDA graphs{'' if reason is None else f': {reason}'}")
    return partial(FixedShape, capture=True) if reason is None else None


@cache
def _say(message: str) -> None:
    logger.info(message)
