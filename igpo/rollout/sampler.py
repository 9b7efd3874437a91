"""The sampler behind denoise: one pass over the blocks of a batch of canvases."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from igpo.config import RolloutConfig
from igpo.ops import unmask_step
from igpo.ops._head import head_logits
from igpo.ops.unmask_step import UnmaskResult
from igpo.types import GIVEN, Canvas, Policy, Rollouts, Seed

from .block_cache import BlockCache
from .filters import check_filters, filtered, is_filtered
from .guidance import check_guidance, guided, unconditional
from .remask import BlockState, remask_key
from .rules import Moment, build_rule
from .schedule import SCHEDULES, Group, Part, counted, groups, scheduled, steps_per_block

OnStep = Callable[[int, Tensor], None]


class Sampler:
    """One call of denoise: its constants, and the results of all B rows, which the blocks fill in."""

    def __init__(
        self,
        policy: Policy,
        canvas: Canvas,
        cfg: RolloutConfig,
        seed: Seed,
        on_step: OnStep | None,
    ) -> None:
        _check(policy, canvas, cfg)
        size, length = canvas.completion.shape
        device = canvas.tokens.device
        self.policy, self.canvas, self.cfg, self.on_step = policy, canvas, cfg, on_step
        self.steps = steps_per_block(length, cfg)
        self.rule, self.schedule = build_rule(cfg), SCHEDULES[cfg.unmask_schedule]
        self.causal = getattr(policy, "block_length", None) is not None
        # completion columns count from here in blocks: prompt tokens may stand in the first one
        self.offset = torch.zeros(size, dtype=torch.int64, device=device)
        self.num_blocks = [length // cfg.block_length] * size
        if self.causal:
            prompts = canvas.attention_mask[:, : canvas.prompt_length].sum(1)
            self.offset = prompts % cfg.block_length
            self.num_blocks = ((self.offset + length - 1) // cfg.block_length + 1).tolist()
        block = (torch.arange(length, device=device) + self.offset[:, None]) // cfg.block_length
        counts = torch.zeros(
            size, max(self.num_blocks, default=0), dtype=torch.int64, device=device
        )
        masked = (canvas.completion == canvas.mask_id).long()
        self.masked = counts.scatter_add(1, block, masked).tolist()  # row, block
        self.seed = seed.named(f"rollout/{seed.step}").value
        self.choice_seed = seed.named(f"rollout/{seed.step}/positions").value
        self.suppressed = torch.tensor((canvas.mask_id, *cfg.suppress_tokens), device=device)
        inside = [t for t in (canvas.mask_id, *cfg.suppress_tokens) if t < len(policy.head_weight)]
        self.banned = torch.tensor(inside, dtype=torch.int64, device=device)
        self.tokens = canvas.tokens.clone()
        self.step_map = torch.full_like(canvas.completion, GIVEN)
        self.logprob = torch.zeros(size, length, device=device)
        self.entropy = torch.zeros_like(self.logprob)
        self.score = torch.zeros_like(self.logprob)
        self.support = None
        if cfg.record_support:
            self.support = torch.full(
                (size, length, cfg.top_k), -1, dtype=torch.int32, device=device
            )
        self.num_steps = [blocks * self.steps for blocks in self.num_blocks]
        self.num_forwards = 0

    def run(self, live: list[int]) -> None:
        """Denoises these rows, block after block; those that stop early leave."""
        cache = BlockCache(self, live) if self.causal and self.cfg.use_cache else None
        for block in range(max(self.num_blocks[row] for row in live)):
            live = [row for row in live if block < self.num_blocks[row]]
            if not live:
                return
            # most masked positions first: the rows that still commit at a step are a prefix
            live.sort(key=lambda row: -self.masked[row][block])
            rows = torch.tensor(live, device=self.tokens.device)
            if cache is not None:
                cache.enter(block, live, rows)
            self._denoise_block(block, live, rows, cache)
            live = self._close_block(block, live, rows)

    def rollouts(self) -> Rollouts:
        num_steps = torch.tensor(self.num_steps, dtype=torch.int64, device=self.tokens.device)
        return Rollouts(
            self.canvas, self.tokens, self.step_map, self.logprob, self.entropy, num_steps, self.num_forwards,
            support=self.support,
        )  # fmt: skip

    def columns(self, block: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(n, block_length) completion columns of a block, and which exist; the first block may begin in the prompt."""
        width = self.cfg.block_length
        found = torch.arange(width, device=rows.device) + block * width - self.offset[rows, None]
        return found, (found >= 0) & (found < self.logprob.shape[1])

    def _denoise_block(
        self, block: int, live: list[int], rows: Tensor, cache: BlockCache | None
    ) -> None:
        plan = list(groups([self.masked[row][block] for row in live], self.steps, self.schedule))
        for step in range(self.steps):
            if self.rule.counted:
                chosen, parts = scheduled(plan, step)
            else:
                left = self._num_masked(block, rows)
                chosen, parts = counted(plan, step, left)
            if parts:
                some = rows[chosen]
                states = self._states(block, rows, chosen, cache)
                for part in parts:
                    where = slice(part.first, part.last)
                    own = [hidden[where] for hidden in states]
                    self._commit(block, step, part, some[where], own, cache is not None)
            if self.rule.revise is not None:
                self._revise(block, step, plan, rows)
            if self.on_step is not None and parts:
                self.on_step(block * self.steps + step, self.tokens.clone())

    def _revise(self, block: int, step: int, plan: list[Group], rows: Tensor) -> None:
        """Masks again what the rule takes back; the records of these positions are as if they were never committed."""
        assert self.rule.revise is not None, "called for a rule that takes nothing back"
        found, exist = self.columns(block, rows)
        inside, tick = found.clamp(0, self.logprob.shape[1] - 1), block * self.steps + step
        there = rows[:, None], inside
        when = self.step_map[there]
        remaining = [0] * len(rows)
        for group in plan:
            rest = [sum(group.schedule[step + 1 :])] * (group.last - group.first)
            remaining[group.first : group.last] = rest
        again = self.rule.revise(
            BlockState(
                exist & (when >= 0), when == tick, self.score[there], self.logprob[there],
                torch.tensor(remaining, device=rows.device), step, self.steps, remask_key(self.choice_seed, tick),
                self.canvas.row_ids[rows],
            )
        )  # fmt: skip
        back = torch.zeros_like(self.step_map[rows]).scatter_add_(1, inside, again.long()).bool()
        records = [
            (self.tokens[:, self.canvas.prompt_length :], self.canvas.mask_id),
            (self.step_map, GIVEN), (self.logprob, 0), (self.entropy, 0),
        ]  # fmt: skip
        for record, nothing in records:
            record[rows] = record[rows].masked_fill(back, nothing)
        if self.support is not None:
            self.support[rows] = self.support[rows].masked_fill(back[..., None], -1)

    def _num_masked(self, block: int, rows: Tensor) -> list[int]:
        """Of each row in the block, as it stands: the host waits for the device."""
        found, exist = self.columns(block, rows)
        return (exist & (self._at(rows, found) == self.canvas.mask_id)).sum(1).tolist()

    def _states(
        self, block: int, rows: Tensor, chosen: list[int] | slice, cache: BlockCache | None
    ) -> list[Tensor]:
        """Hidden states of the chosen rows' canvases, or with a cache of their blocks; with guidance also without
        what was given."""
        if cache is not None:
            hidden = cache.hidden(block, rows)
            self.num_forwards += len(hidden)
            return [hidden[chosen]]
        some, canvas = rows[chosen], self.canvas
        tokens = [self.tokens[some]]
        if self.cfg.cfg_scale:
            tokens.append(unconditional(canvas, tokens[0], some))
        self.num_forwards += len(some) * len(tokens)
        mask, position_ids = canvas.attention_mask[some], canvas.position_ids[some]
        return [self.policy.hidden(x, mask, position_ids) for x in tokens]

    def _commit(
        self,
        block: int,
        step: int,
        part: Part,
        rows: Tensor,
        states: list[Tensor],
        block_only: bool,
    ) -> None:
        """Commits positions of a part's rows, each of which has part.left masked ones.

        states: hidden states of the whole canvas, or with block_only of the block.
        """
        shift, tick = self.canvas.prompt_length, block * self.steps + step
        found, exist = self.columns(block, rows)
        masked = exist & (self._at(rows, found) == self.canvas.mask_id)
        # the masked columns in ascending order; a draw is keyed by its place among them, a matter of this row alone
        places = masked.byte().argsort(dim=1, descending=True, stable=True)[:, : part.left]
        columns = found.gather(1, places)
        there, local = rows[:, None], torch.arange(len(rows), device=rows.device)[:, None]
        at = places if block_only else columns + shift
        logits, *free = (
            head_logits(hidden[local, at], self.policy.head_weight, self.policy.head_bias)
            for hidden in states
        )
        if free:
            logits = guided(logits, free[0], self.cfg.cfg_scale)
        moment = Moment(
            part.quota, step, self.steps, self.choice_seed, tick, self.canvas.row_ids[rows]
        )
        support = None
        if is_filtered(self.cfg):
            logits, support = filtered(logits, self.banned, self.cfg)
        result = self._result(logits, self.tokens[there, columns + shift], moment)
        self.tokens[there, columns + shift] = result.tokens
        for record, value in (
            (self.step_map, torch.full_like(columns, tick)),
            (self.logprob, result.logprob.float()),
            (self.entropy, result.entropy.float()),
            (self.score, result.score.float()),
        ):
            record[there, columns] = torch.where(result.committed, value, record[there, columns])
        if self.support is not None and support is not None:
            self.support[there, columns] = torch.where(
                result.committed[..., None], support.int(), self.support[there, columns]
            )

    def _result(self, logits: Tensor, tokens: Tensor, at: Moment) -> UnmaskResult:
        """One call of unmask_step, and the rule's own choice among its candidates where it has one."""
        rule, temperature = self.rule, self.cfg.temperature
        if rule.tempered and temperature:
            logits, temperature = logits.float() / temperature, 1.0
        result = unmask_step(
            logits,
            tokens,
            mask_id=self.canvas.mask_id,
            num_unmask=at.quota if rule.choose is None else tokens.shape[1],
            temperature=temperature,
            confidence=rule.score,
            suppress_tokens=self.suppressed,
            seed=self.seed,
            step=at.tick,
            row_ids=at.row_ids,
        )
        if rule.choose is None:
            return result
        committed = rule.choose(result, at)
        kept = torch.where(committed, result.tokens, tokens)
        return result._replace(tokens=kept, committed=committed)

    def _close_block(self, block: int, live: list[int], rows: Tensor) -> list[int]:
        """Fills rows that ended in this block with EOS; returns the others. The one host synchronisation of a block."""
        found, exist = self.columns(block, rows)
        tokens, eos_id = self._at(rows, found), self.canvas.eos_id
        left = (exist & (tokens == self.canvas.mask_id)).any(1)
        ended = torch.zeros_like(left)
        if self.cfg.early_stop and eos_id is not None:
            is_eos = tokens == eos_id
            ended = (exist & is_eos).any(1) if self.causal else is_eos.all(1)
        left, ended = torch.stack((left, ended)).tolist()
        if any(left):
            raise FloatingPointError(
                "denoise: the policy's logits must offer a candidate for every masked position, got none (NaN, or all "
                f"-inf) in block {block} of rows {[row for row, bad in zip(live, left, strict=True) if bad]}. "
                "Check the model's weights and dtype."
            )
        finished = [row for row, end in zip(live, ended, strict=True) if end]
        if finished and eos_id is not None:
            self._fill_rest(block, finished, eos_id)
        return [row for row, end in zip(live, ended, strict=True) if not end]

    def _fill_rest(self, block: int, finished: list[int], eos_id: int) -> None:
        num_steps = (block + 1) * self.steps
        rows = torch.tensor(finished, device=self.tokens.device)
        completion = self.tokens[:, self.canvas.prompt_length :]
        # what a block before left masked does not exist: the rest are the masked columns
        masked = completion[rows] == self.canvas.mask_id
        completion[rows] = torch.where(masked, eos_id, completion[rows])
        self.step_map[rows] = torch.where(masked, num_steps, self.step_map[rows])
        for row in finished:
            self.num_steps[row] = num_steps

    def _at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Tokens of completion columns; of the nearest one there is for those outside."""
        there = (columns + self.canvas.prompt_length).clamp(0, self.tokens.shape[1] - 1)
        return self.tokens[rows[:, None], there]


def _check(policy: Policy, canvas: Canvas, cfg: RolloutConfig) -> None:
    if cfg.rollout_batch_size < 1:
        raise ValueError(
            f"denoise: rollout_batch_size must be positive, got {cfg.rollout_batch_size}."
        )
    grid = getattr(policy, "block_length", None)
    if grid not in (None, cfg.block_length):
        raise ValueError(
            f"denoise: block_length must be the policy's own, {grid}, got {cfg.block_length}. Set block_length={grid}."
        )
    vocabulary = policy.head_weight.shape[0]
    check_filters(cfg)
    check_guidance(policy, cfg)
    for name in ("suppress_tokens", "defer_tokens"):
        if any(not 0 <= token < vocabulary for token in getattr(cfg, name)):
            raise ValueError(
                f"denoise: {name} must be in [0, {vocabulary}), got {getattr(cfg, name)}."
            )
    wrong = (canvas.completion == canvas.mask_id) == canvas.frozen
    if bool(wrong.any()):
        raise ValueError(
            "denoise: canvas.frozen must be True exactly where a completion position is not mask_id, got "
            f"{int(wrong.sum())} positions where it is not. Use with_hints to place tokens."
        )
