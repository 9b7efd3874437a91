"""One line of results per (task, row, seed), made where it is missing or of another recipe."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from counting import Counting

from igpo.config import Config
from igpo.demo.task import grader, training_run
from igpo.environment import git_commit
from igpo.evaluate import evaluate
from igpo.logging import RunLog, progress, say
from igpo.models import MaskedDecoder
from igpo.optim import TrainingError
from igpo.train import train
from igpo.types import Graded, Metrics, Policy, Prompt, Seed

from .recipe import NUM_EVAL, NUM_STEPS, Entry, config, digest, entries
from .starts import fingerprint, start
from .tasks import TASKS

HELD_OUT_SEED = Seed(2)
Line = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """What is run.

    starts: the folder of the starting checkpoints.   num_steps, num_eval: RL steps, held-out problems.
    """

    starts: Path
    tasks: Sequence[str] = tuple(TASKS)
    num_steps: int = NUM_STEPS
    num_eval: int = NUM_EVAL

    def recipe(self, task: str, entry: Entry) -> str:
        weights = self.places[task, entry.block_causal].fingerprint
        return digest(task, entry, weights, self.num_steps, self.num_eval)

    @cached_property
    def commit(self) -> str | None:
        return git_commit()

    @cached_property
    def places(self) -> dict[tuple[str, bool], Place]:
        kinds = {entry.block_causal for entry in entries().values()}
        return {
            (task, blocks): Place(task, start(task, blocks, self.starts), self.num_eval)
            for task in self.tasks
            for blocks in sorted(kinds)
        }


@dataclass(frozen=True)
class Place:
    """A task and the model that its rows start from."""

    task: str
    model: MaskedDecoder
    num_eval: int

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.model)

    @cached_property
    def held_out(self) -> list[Prompt]:
        return TASKS[self.task].problems(self.num_eval, HELD_OUT_SEED, "held-out")

    @cached_property
    def before(self) -> dict[str, float]:
        """Held-out accuracy of the start, at temperature 0 and at that of rollouts."""
        cfg = config(self.task, entries()["grpo"], 0)
        hot = replace(cfg.evaluation, eval_temperature=cfg.rollout.temperature)
        sampled = self.accuracy(self.model, replace(cfg, evaluation=hot))
        return {"accuracy": self.accuracy(self.model, cfg), "sampled": sampled}

    def accuracy(self, policy: Policy, cfg: Config) -> float:
        task = TASKS[self.task]
        return evaluate(policy, task.tokenizer(), self.held_out, grader(task), cfg)["accuracy"]


def run(
    study: Study, names: Sequence[str], seeds: Sequence[int], path: Path, part: tuple[int, int] = (1, 1)
) -> None:  # fmt: skip
    """Appends to `path` what it lacks, seed by seed, so that what is cut off is the last seeds of all rows.

    part (i, n): the i-th of n processes that share the file, each with runs of its own.
    """
    index, of = part
    wanted = [(s, name, task) for s in seeds for name in names for task in study.tasks][
        index - 1 :: of
    ]
    known = entries()
    current = {(x["task"], x["row"], x["seed"]) for x in read(path) if is_current(study, x)}
    missing = [(s, n, t) for s, n, t in wanted if (t, n, s) not in current]
    stale = len({(x["task"], x["row"], x["seed"]) for x in read(path)} - current)
    say(f"{len(missing)} of {len(wanted)} runs to do; {stale} of the file have another recipe")
    with progress(len(missing), "learning table") as advance:
        for seed, name, task in missing:
            line = run_one(study, task, name, known[name], seed)
            with path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
            advance(accuracy=line["after"] or 0.0)


def read(path: Path) -> list[Line]:
    """The lines of a file, of each (task, row, seed) the last."""
    if not path.exists():
        return []
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return list({(x["task"], x["row"], x["seed"]): x for x in lines}.values())


def is_current(study: Study, line: Line) -> bool:
    """Whether today's recipe is the one the line was made by."""
    entry = entries().get(line["row"])
    return (
        entry is not None
        and line["task"] in study.tasks
        and line["recipe"] == study.recipe(line["task"], entry)
    )


def run_one(study: Study, task: str, name: str, entry: Entry, seed: int) -> Line:
    """One training run from the task's start. after is None where the run had to stop; stopped then says why."""
    place, cfg = study.places[task, entry.block_causal], config(task, entry, seed, study.num_steps)
    began = time.process_time()
    course = Course(Counting(copy.deepcopy(place.model)), Counting(copy.deepcopy(place.model)))
    stopped = course.train(task, cfg)
    seconds = time.process_time() - began
    return {
        "task": task,
        "row": name,
        "seed": seed,
        "recipe": study.recipe(task, entry),
        "start": place.fingerprint,
        "commit": study.commit,
        "before": place.before["accuracy"],
        "after": None if stopped else place.accuracy(course.policy.model, cfg),
        **course.summary(cfg),
        "stopped": stopped,
        "seconds": round(seconds, 2),
    }


class Course:
    """A training run, what it cost and what its rollouts earned."""

    def __init__(self, policy: Counting, frozen: Counting) -> None:
        self.policy, self.frozen = policy, frozen
        self.rewards: list[float] = []
        self.all_wrong: float | None = None  # of the first step's groups
        self.explored = 0.0
        self.critic = Counting(policy.model)  # counts for it

    def train(self, task: str, cfg: Config) -> str | None:
        """Trains; returns why it had to stop, if it had to."""

        @contextmanager
        def reference() -> Iterator[Policy]:
            yield self.frozen

        with tempfile.TemporaryDirectory() as folder:
            cfg = replace(cfg, train=replace(cfg.train, output_dir=folder))
            run = training_run(
                cfg, TASKS[task], self.policy, reference=reference, observe=self.observe
            )
            if run.critic is not None:
                run.critic.network.register_forward_pre_hook(
                    lambda _, inputs: self.critic.count(len(inputs[0]))
                )
            try:
                with RunLog(cfg) as log:
                    train(run, log)
            except TrainingError as error:
                return str(error)
        return None

    def observe(self, step: int, graded: Graded, metrics: Metrics) -> None:
        if not self.rewards:
            self.all_wrong = metrics.get("inpaint/groups_all_wrong")
        self.rewards.append(metrics["reward"])
        self.explored += metrics["rollout/forwards"]

    def summary(self, cfg: Config) -> dict[str, Any]:
        """forwards: sequences x calls. rollouts: of the main completions; exploration: of what the explorer adds;
        scoring: without a graph, by the policy, the old one, the reference and the critic; training: with one."""
        size = cfg.train.prompts_per_step * cfg.rl.num_generations * len(self.rewards)
        main = min(size * cfg.rollout.diffusion_steps, round(self.explored))
        last = self.rewards[-max(1, len(self.rewards) // 4) :]
        return {
            "reward": self.rewards[0] if self.rewards else None,
            "reward_last": sum(last) / len(last) if last else None,
            "all_wrong": self.all_wrong,
            "completions": size,
            "forwards": {
                "rollouts": main,
                "exploration": round(self.explored) - main,
                "scoring": self.policy.plain
                + self.frozen.plain
                + self.critic.plain
                - round(self.explored),
                "training": self.policy.with_graph + self.critic.with_graph,
            },
        }
