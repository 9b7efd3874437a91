"""The critic of a run: a second network beside the policy, with an optimizer of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import metrics
from .config import Config, ConfigError
from .models import MaskedDecoder, load_model
from .models.adapters import add_adapters
from .models.critic import CriticModel
from .optim import Updater, failing_rows
from .policy import prepare
from .ranks import ranks
from .rl.algorithms import Algorithm
from .rl.critique import Critique, Lesson, fit
from .types import Metrics, Seed


@dataclass(frozen=True)
class Critic:
    """A network that an algorithm's critique (igpo.rl.critique) reads and teaches, `size` rows a forward."""

    network: CriticModel
    updater: Updater
    size: int

    def update(
        self, critique: Critique, lessons: Sequence[Lesson], where: str, name: Callable[[int], str]
    ) -> Metrics:
        """One optimizer update from the loss of the lessons. Raises TrainingError before one that is not finite."""
        loss, found = self.backward(critique, lessons)
        done = self.updater.step(
            loss, f"{where}, critic", lambda: self._culprits(critique, lessons, name)
        )
        return {**found, "critic/loss": loss, **{f"critic/{key}": x for key, x in done.items()}}

    def backward(self, critique: Critique, lessons: Sequence[Lesson]) -> tuple[float, Metrics]:
        """Adds the gradient of the lessons' loss."""
        total = {"loss": 0.0}
        for lesson in lessons:
            metrics.add(total, self._of_rows(critique, lesson, _rows(lesson)))
        return total.pop("loss"), total

    def weights(self) -> dict[str, Tensor]:
        """What is trained; the rest of the network is the policy's, or that of its folder."""
        named = self.network.named_parameters()
        return {name: weight.detach() for name, weight in named if weight.requires_grad}

    def load_weights(self, saved: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, weight in self.weights().items():
                weight.copy_(saved[name])

    def _of_rows(self, critique: Critique, lesson: Lesson, rows: Tensor) -> dict[str, float]:
        total = {"loss": 0.0}
        for loss, found in fit(self.network, critique, lesson, rows, self.size):
            metrics.add(total, {"loss": loss, **found})
        return ranks().added(total)

    def _culprits(
        self, critique: Critique, lessons: Sequence[Lesson], name: Callable[[int], str]
    ) -> list[str]:
        found = []
        for lesson in lessons:

            def fails(rows: Tensor, lesson: Lesson = lesson) -> bool:
                self.updater.zero_grad()
                loss = self._of_rows(critique, lesson, rows)["loss"]
                return not torch.isfinite(torch.tensor([loss, self.updater.gradient_norm()])).all()

            rows = _rows(lesson)
            if fails(rows):
                ids = lesson.canvas.row_ids[failing_rows(fails, rows, self.size)].tolist()
                found += [f"{lesson.kind}{name(row_id)}" for row_id in ids]
        return found


def build_critic(cfg: Config, policy: Any, algorithm: Algorithm) -> Critic | None:
    """The critic of an algorithm that has one; None for the others.

    A copy of the policy as it stands, in its dtype, on its device, with adapters where it has some; or the model in
    critic_name_or_path. Its optimizer is the policy's but for critic_learning_rate; it makes one update in each inner
    update. Call it before the policy is trained, or its checkpoint restored.

    Raises:
        ConfigError: critic_num_layers is more than there are, or the model of critic_name_or_path has another
            vocabulary.
    """
    if algorithm.critique is None:
        return None
    critic = cfg.rl.critic
    if critic.critic_name_or_path is None:
        body = copy.deepcopy(policy)
    else:
        body = _other(cfg, policy, critic.critic_name_or_path)
    if critic.critic_num_layers is not None:
        _shorten(body, critic.critic_num_layers)
    network = CriticModel(body).eval()
    train = replace(cfg.train, learning_rate=critic.critic_learning_rate)
    updater = Updater(network, train, train.max_steps * cfg.rl.num_iterations)
    return Critic(network, updater, train.per_device_train_batch_size)


def _other(cfg: Config, policy: Any, path: str) -> Any:
    body = load_model(path, dtype=policy.dtype, device=policy.device)
    if (body.config.vocab_size, body.config.mask_token_id) != (
        policy.config.vocab_size, policy.config.mask_token_id,
    ):  # fmt: skip
        raise ConfigError(
            f"critic_name_or_path must have the policy's vocabulary and mask token, got {body.config.vocab_size} "
            f"tokens, mask {body.config.mask_token_id}, and for the policy {policy.config.vocab_size}, mask "
            f"{policy.config.mask_token_id}. Leave it out for a copy of the policy."
        )
    prepare(body, cfg)
    seed = Seed(cfg.train.seed).named("critic")
    return add_adapters(body, cfg.lora, seed) if cfg.lora.use_lora else body


def _shorten(body: Any, count: int) -> None:
    for module in body.modules():
        if isinstance(module, MaskedDecoder):
            if count > len(module.layers):
                raise ConfigError(
                    f"critic_num_layers must be at most the {len(module.layers)} of the model, got {count}."
                )
            module.layers = module.layers[:count]


def _rows(lesson: Lesson) -> Tensor:
    return torch.arange(len(lesson.tokens), device=lesson.tokens.device)
