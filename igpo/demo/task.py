"""What training on generated problems asks of a task, and the run of it. The demo's task is the chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from igpo.config import Config, RewardConfig
from igpo.critic import build_critic
from igpo.evaluate import evaluate
from igpo.optim import Updater
from igpo.policy import Reference
from igpo.rewards import Grade, make_grader
from igpo.rl.algorithms import build_algorithm
from igpo.train import Run
from igpo.types import Graded, Metrics, Prompt, Seed

Observer = Callable[[int, Graded, Metrics], None]


class Task(Protocol):
    """A family of generated problems."""

    def tokenizer(self) -> Any: ...

    def problems(self, count: int, seed: Seed, split: str) -> list[Prompt]:
        """`count` problems of the "train" or the "held-out" split; a problem belongs to one split for good."""
        ...

    def is_correct(self, prompt: Prompt, completion: str) -> bool: ...


@dataclass(frozen=True)
class Problems:
    """Fresh training problems for every step; the same for all runs of a seed."""

    task: Task
    size: int
    seed: Seed

    def at(self, step: int) -> list[Prompt]:
        return self.task.problems(self.size, self.seed.at(step), "train")


def grader(task: Task) -> Grade:
    """1 for a completion the task's verifier accepts, judged in this process."""

    def verifier(text: str, prompt: Prompt) -> bool:
        return task.is_correct(prompt, text)

    return make_grader(task.tokenizer(), RewardConfig(), verifier=verifier)


def training_run(
    cfg: Config, task: Task, policy: Any, *, reference: Reference | None = None,
    held_out: Sequence[Prompt] = (), observe: Observer | None = None,
) -> Run:  # fmt: skip
    """A run of igpo.train on fresh problems of `task`; policy is trained in place. held_out: for eval_steps."""
    tokenizer, grade = task.tokenizer(), grader(task)
    algorithm = build_algorithm(cfg.rl, cfg.rollout, grade, pad_id=tokenizer.pad_token_id)
    algorithm.likelihood.check(policy)
    critic = build_critic(cfg, policy, algorithm)
    return Run(
        cfg=cfg,
        policy=policy,
        tokenizer=tokenizer,
        batches=Problems(task, cfg.train.prompts_per_step, Seed(cfg.train.seed)),
        grade=grade,
        algorithm=algorithm,
        reference=reference if algorithm.likelihood.needs_reference else None,
        updater=Updater(policy, cfg.train, cfg.train.max_steps * cfg.rl.num_iterations),
        evaluate=partial(evaluate, policy, tokenizer, held_out, grade, cfg) if held_out else None,
        observe=observe,
        critic=critic,
    )
