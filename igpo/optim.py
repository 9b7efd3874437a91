"""AdamW with float32 masters, warm-up and clipping, and the guard in front of every update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig


class TrainingError(RuntimeError):
    """A run has to stop; the message says where and why."""


def learning_rate(update: int, cfg: TrainConfig, num_updates: int) -> float:
    """The rate of optimizer update `update` (0-based) out of num_updates.

    Linear warm-up whose first update is learning_rate / warmup_steps (transformers' schedules spend the first update
    at 0), then constant, linear to 0, or half a cosine to 0. lr_scheduler_type="constant" has no warm-up.
    """
    kind, warmup = cfg.lr_scheduler_type, cfg.warmup_steps
    if kind == "constant":
        return cfg.learning_rate
    if update < warmup:
        return cfg.learning_rate * (update + 1) / warmup
    done = (update - warmup) / max(1, num_updates - warmup)
    shape = {
        "constant_with_warmup": 1.0,
        "linear": max(0.0, 1.0 - done),
        "cosine": 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))),
    }
    return cfg.learning_rate * shape[kind]


class Updater:
    """Optimizer updates of a model: call `backward()` on losses as often as needed, then `step`.

    Weights in a 16-bit type are rounded copies of float32 masters, which collect the gradients and take the updates:
    an update of 5e-7 is far below the resolution of bfloat16. Matrices have weight decay, vectors (norms, biases) do
    not.
    """

    def __init__(self, model: nn.Module, cfg: TrainConfig, num_updates: int) -> None:
        self.cfg, self.num_updates, self.done = cfg, num_updates, 0
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.masters = [self._master(p) for p in self.weights]
        groups = [
            {"params": [m for m in self.masters if m.dim() >= 2], "weight_decay": cfg.weight_decay},
            {"params": [m for m in self.masters if m.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=cfg.learning_rate,
            betas=(cfg.adam_beta1, cfg.adam_beta2),
            eps=cfg.adam_epsilon,
        )

    @staticmethod
    def _master(weight: Tensor) -> Tensor:
        if weight.dtype == torch.float32:
            return weight
        master = weight.detach().float().requires_grad_()

        def collect(weight: Tensor) -> None:
            assert weight.grad is not None, "the hook runs after a gradient was accumulated"
            gradient = weight.grad.float()
            master.grad = gradient if master.grad is None else master.grad + gradient
            weight.grad = None

        weight.register_post_accumulate_grad_hook(collect)
        return master

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def gradient_norm(self) -> float:
        """The 2-norm of the gradient collected since the last update, in float32."""
        gradients = [m.grad for m in self.masters if m.grad is not None]
        return float(nn.utils.get_total_norm(gradients)) if gradients else 0.0

    def step(
        self, loss: float, where: str, rows: Callable[[], Sequence[int | str]]
    ) -> dict[str, float]:
        """One update from the gradient collected so far; returns grad_norm (before clipping) and learning_rate.

        Args:
            loss: what the gradient is of.   where: "step 12, inner update 1", for the message.
            rows: called after a failure only: the rows to blame.
        Raises:
            TrainingError: loss or gradient is not finite. Weights and optimizer are as before the call.
        """
        norm = self.gradient_norm()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            culprits = ", ".join(map(str, rows()))
            self.zero_grad()
            raise TrainingError(
                f"{where}: the loss is {loss:.6g} and the norm of its gradient {norm:.6g}; both must be finite. "
                f"Rows: {culprits}. The update was not made: the weights are those of the update before."
            )
        rate = learning_rate(self.done, self.cfg, self.num_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        nn.utils.clip_grads_with_norm_(self.masters, self.cfg.max_grad_norm, torch.tensor(norm))
        self.optimizer.step()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                if weight is not master:
                    weight.copy_(master)
        self.zero_grad()
        self.done += 1
        return {"grad_norm": norm, "learning_rate": rate}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only: what torch.load(weights_only=True) reads."""
        pairs = zip(self.weights, self.masters, strict=True)
        masters = [None if master is weight else master.detach() for weight, master in pairs]
        return {"done": self.done, "optimizer": self.optimizer.state_dict(), "masters": masters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for master, saved in zip(self.masters, state["masters"], strict=True):
                if saved is not None:
                    master.copy_(saved)
