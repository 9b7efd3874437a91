"""`igpo rewrite`: verbose worked solutions into concise ones that fit the canvas and still end in the right answer.

Left out of the paper (arXiv:2509.10396, section 3.3): its prompt and its rewriting model, which are not published.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .config import Config, ConfigError
from .data import Problem, concise, problems
from .data.recipes import parse
from .data.templates import Template, template
from .logging import progress, say
from .options import RewriteOptions
from .policy import load_tokenizer
from .rewards import VerifierPool, has_answer
from .rewrite_client import Client, Reply, RequestFailed
from .rewrite_files import Journal, Result, write_results

_FAILED_IN_A_ROW = (
    20  # requests, after all their retries: then the endpoint is taken to be down; chosen
)
_MARKER = "####"

Check = Callable[[Problem, str], tuple[str | None, int]]


def run(cfg: Config, options: RewriteOptions) -> dict[str, float]:
    """Rewrites the traces of train_file into output_file. Returns the numbers of rewrite.json.

    What was finished before an interruption is kept in a journal beside the output and never asked for again.

    Raises:
        ConfigError: options that cannot be meant, or a journal of other settings. EndpointError: the endpoint refuses.
        RuntimeError: requests failed; the same command goes on with what is missing.
    """
    if cfg.data.train_file is None:
        raise ConfigError("train_file must name the problems to rewrite, got none.")
    options = replace(
        options, max_trace_length=options.max_trace_length or cfg.rollout.max_completion_length
    )
    _check(options)
    found = list(problems(cfg.data.train_file, cfg.data, options.limit))
    tokenizer = load_tokenizer(cfg.model)
    form = template(cfg.data, parse(cfg.data.train_file, cfg.data)[0].kind)
    with (
        VerifierPool(cfg.reward.verify_workers, cfg.reward.verify_timeout_s) as pool,
        Journal(Path(options.output_file), _settings(cfg, options)) as journal,
    ):
        checks = Checks(cfg, options, tokenizer, form, pool)
        todo = [p for p in found if p.row.row_id not in journal.results]
        if journal.results:
            say(f"rewrite: {len(journal.results)} of {len(found)} are done already")
        failed = asyncio.run(_rewrite(todo, options, checks, journal))
        numbers = write_results(Path(options.output_file), found, journal, cfg, options)
    if failed:
        raise RuntimeError(
            f"rewrite: {len(failed)} of {len(found)} requests failed, the last with: {failed[-1]}. "
            "Run the same command again for these."
        )
    say(f"written: {options.output_file}")
    return numbers


def _check(options: RewriteOptions) -> None:
    if (options.base_url is None) != (options.rewrite_model is None):
        raise ConfigError(
            "base_url and rewrite_model must both be set for an endpoint, or neither for the rewriter without a model."
        )
    for name in ("concurrency", "num_attempts", "max_trace_length", "max_tokens"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(options, name)}.")
    for name in ("max_retries", "rewrite_temperature", "prompt_price", "completion_price"):
        if getattr(options, name) < 0:
            raise ConfigError(f"{name} must not be negative, got {getattr(options, name)}.")
    if options.request_timeout_s <= 0:
        raise ConfigError(f"request_timeout_s must be positive, got {options.request_timeout_s}.")


def _settings(cfg: Config, options: RewriteOptions) -> str:
    """What results depend on; a journal of other settings is not continued."""
    used = {
        "train_file": cfg.data.train_file, "data": asdict(cfg.data) | {"eval_file": None}, "task": cfg.reward.task,
        "compat": cfg.reward.compat, "model": options.rewrite_model, "base_url": options.base_url,
        "budget": options.max_trace_length, "temperature": options.rewrite_temperature,
        "attempts": options.num_attempts, "tokenizer": cfg.model.tokenizer_name_or_path or cfg.model.model_name_or_path,
    }  # fmt: skip
    return hashlib.blake2b(json.dumps(used, sort_keys=True).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Checks:
    """Whether a rewritten trace may replace the original one."""

    cfg: Config
    options: RewriteOptions
    tokenizer: Any
    form: Template
    pool: VerifierPool

    def num_tokens(self, solution: str, answer: str | None) -> int:
        """Of the completion a policy would learn, EOS included."""
        text, _ = self.form.completion(solution, answer)
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1

    def solution(self, text: str) -> str:
        """A reply without its last line, "#### answer"."""
        body, marker, _ = text.rpartition(_MARKER)
        return (body if marker else text).strip()

    def reason(self, problem: Problem, text: str, tokens: int) -> str | None:
        """Why not; None when it may."""
        if not self.solution(text):
            return "empty"
        if not self._is_right(problem, text):
            return "wrong answer"
        if tokens > (self.options.max_trace_length or 0):
            return f"too long: {tokens} tokens"
        return None

    def _is_right(self, problem: Problem, text: str) -> bool:
        reward = self.cfg.reward
        if problem.answer is None:
            return False
        if reward.task == "answer":
            return has_answer(text, problem.answer)
        (verdict,) = self.pool.verify(reward.task, [text], [problem.answer], reward.compat)
        return verdict.correct


async def _rewrite(
    todo: Sequence[Problem], options: RewriteOptions, checks: Checks, journal: Journal
) -> list[str]:
    """Messages of the requests that failed for good."""
    client = None if options.base_url is None else Client(options)
    waiting = iter(todo)
    failed: list[str] = []
    streak = 0
    with progress(len(todo), "rewrite") as advance:

        async def work() -> None:
            nonlocal streak
            for problem in waiting:
                if streak >= _FAILED_IN_A_ROW:
                    return
                try:
                    journal.add(await _one(problem, client, options, checks))
                    streak = 0
                except RequestFailed as error:
                    failed.append(str(error))
                    streak += 1
                advance(1, **journal.shown(options))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(options.concurrency, max(1, len(todo)))):
                    group.create_task(work())
        except* RuntimeError as errors:  # the endpoint refuses: one message, not one per task
            raise errors.exceptions[0] from None
        finally:
            if client is not None:
                await client.close()
    return failed


async def _one(
    problem: Problem, client: Client | None, options: RewriteOptions, checks: Checks
) -> Result:
    row = problem.row.row_id
    if problem.solution is None or problem.answer is None:
        missing = "no trace" if problem.solution is None else "no answer"
        return Result(row, reason=missing)
    before = checks.num_tokens(problem.solution, problem.answer)
    result = Result(row, num_tokens_before=before)
    for attempt in range(1, (1 if client is None else options.num_attempts) + 1):
        if client is None:
            text = f"{concise(problem.solution, problem.question)}\n{_MARKER} {problem.answer}"
            reply = Reply(text, 0, 0)
        else:
            reply = await client.ask(problem.question, problem.solution, problem.answer)
        trace = checks.solution(reply.text)
        tokens = checks.num_tokens(trace, problem.answer)
        result = replace(
            result, attempts=attempt, trace=trace, num_tokens=tokens,
            prompt_tokens=result.prompt_tokens + reply.prompt_tokens,
            completion_tokens=result.completion_tokens + reply.completion_tokens,
            reason=await asyncio.to_thread(checks.reason, problem, reply.text, tokens),
        )  # fmt: skip
        if result.reason is None:
            break
    return result
