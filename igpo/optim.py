"""AdamW with float32 masters, warm-up and clipping, and the guard in front of every update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .ranks import ranks


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


def failing_rows(fails: Callable[[Tensor], bool], rows: Tensor, size: int) -> Tensor:
    """Those of `rows` that fail by themselves, looked for in parts of `size`; all when only their sum fails."""
    suspects = [row for part in rows.split(size) if fails(part) for row in part]
    found = [row for row in suspects if fails(row[None])]
    return torch.stack(found) if found else rows


class Updater:
    """Optimizer updates of a model: call `backward()` on losses as often as needed, then `step`.

    Weights in a 16-bit type are rounded copies of float32 masters, which take the updates; their gradients are added up
    in float32: an update of 5e-7 is far below the resolution of bfloat16. Matrices have weight decay, vectors (norms,
    biases) do not.

    On several processes every weight has one owner, which keeps its master and moments, gets the sum of the gradients
    and sends the updated weight to the others (the first stage of ZeRO, arXiv:1910.02054).
    """

    def __init__(self, model: nn.Module, cfg: TrainConfig, num_updates: int) -> None:
        self.cfg, self.num_updates, self.done = cfg, num_updates, 0
        self.ranks, self.summed = ranks(), False
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.owners = _owners([p.numel() for p in self.weights], self.ranks.size)
        self.gradients: dict[int, Tensor | None] = dict.fromkeys(range(len(self.weights)))
        self.masters = [self._master(i, p) for i, p in enumerate(self.weights)]
        mine = [m for m in self.masters if m is not None]
        groups = [
            {"params": [m for m in mine if m.dim() >= 2], "weight_decay": cfg.weight_decay},
            {"params": [m for m in mine if m.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=cfg.learning_rate,
            betas=(cfg.adam_beta1, cfg.adam_beta2),
            eps=cfg.adam_epsilon,
        )

    def _master(self, index: int, weight: Tensor) -> Tensor | None:
        """None for another process's weight. A 16-bit weight gives its gradients away as they come."""
        owned = self.owners[index] == self.ranks.rank
        if weight.dtype == torch.float32:
            return weight if owned else None

        def collect(weight: Tensor) -> None:
            assert weight.grad is not None, "the hook runs after a gradient was accumulated"
            gradient, before = weight.grad.float(), self.gradients[index]
            self.gradients[index] = gradient if before is None else before + gradient
            weight.grad = None

        weight.register_post_accumulate_grad_hook(collect)
        return weight.detach().float().requires_grad_() if owned else None

    def zero_grad(self) -> None:
        self.gradients = dict.fromkeys(range(len(self.weights)))
        self.summed = False
        for tensor in (*self.weights, *self.masters):
            if tensor is not None:
                tensor.grad = None

    def gradient_norm(self) -> float:
        """The 2-norm of the gradient collected since the last update, in float32; of all processes' together."""
        self._sum()
        mine = [m.grad for m in self.masters if m is not None and m.grad is not None]
        norm = float(nn.utils.get_total_norm(mine)) if mine else 0.0
        if self.ranks.size == 1:
            return norm
        return math.sqrt(self.ranks.added({"square": norm**2})["square"])

    def _sum(self) -> None:
        """Gives each master the gradient of its weight, once between two updates."""
        if self.summed:
            return
        self.summed = True
        for index, weight in enumerate(self.weights):
            if self.gradients[index] is None:
                self.gradients[index], weight.grad = weight.grad, None
        present = [i for i, gradient in self.gradients.items() if gradient is not None]
        for index in sorted(set().union(*self.ranks.all(present))):
            gradient, master = self.gradients[index], self.masters[index]
            if gradient is None:
                gradient = torch.zeros_like(self.weights[index], dtype=torch.float32)
            self.ranks.add_to(self.owners[index], gradient)
            if master is not None:
                master.grad = gradient
            self.gradients[index] = None

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
        mine = [m for m in self.masters if m is not None]
        nn.utils.clip_grads_with_norm_(mine, self.cfg.max_grad_norm, torch.tensor(norm))
        self.optimizer.step()
        self._publish()
        self.zero_grad()
        self.done += 1
        return {"grad_norm": norm, "learning_rate": rate}

    @torch.no_grad()
    def _publish(self) -> None:
        for weight, master, owner in zip(self.weights, self.masters, self.owners, strict=True):
            if master is not None and weight is not master:
                weight.copy_(master)
            self.ranks.spread(owner, weight.data)

    def state_dict(self) -> dict[str, Any]:
        """Of the weights this process owns, by their place in the model; tensors and numbers only: what
        torch.load(weights_only=True) reads."""
        found = {}
        for index, (weight, master) in enumerate(zip(self.weights, self.masters, strict=True)):
            if master is None:
                continue
            found[index] = dict(self.optimizer.state[master])
            if master is not weight:
                found[index]["master"] = master.detach()
        return {"done": self.done, "weights": found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a state that holds (at least) the weights this process owns, by however many processes it was saved."""
        self.done = state["done"]
        with torch.no_grad():
            for index, master in enumerate(self.masters):
                if master is None:
                    continue
                saved = {k: v.to(master.device) for k, v in state["weights"][index].items()}
                if master is not self.weights[index]:
                    master.copy_(saved.pop("master"))
                if "step" in saved:  # on the device it would be read back in every update
                    saved["step"] = saved["step"].cpu()
                self.optimizer.state[master] = saved


def _owners(sizes: Sequence[int], processes: int) -> list[int]:
    """A process for each weight: largest first, each to the one that has least."""
    load, owners = [0] * processes, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[index] = load.index(min(load))
        load[owners[index]] += sizes[index]
    return owners
