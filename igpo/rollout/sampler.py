"""The sampler behind denoise: rows in flight, a step of theirs, and who leaves and enters."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby

import torch
from torch import Tensor

from igpo.config import RolloutConfig
from igpo.ops import unmask_step
from igpo.ops.unmask_step import UnmaskResult
from igpo.types import Canvas, Policy, Rollouts, Seed

from .block_cache import BlockCache
from .blocks import Blocks
from .canvas_cache import CanvasCache, check_cache
from .filters import check_filters, filtered, is_filtered
from .flight import InFlight, Part, working
from .graphs import fixed_shapes
from .guidance import check_guidance, predicted
from .records import Records
from .remask import BlockState, remask_key
from .rules import Moment, build_rule
from .schedule import SCHEDULES, steps_per_block
from .stability import Stability
from .states import States, WholeCanvas

OnStep = Callable[[int, Tensor], None]


class Sampler:
    """One call of denoise: its constants, and the records of all B rows, which the rounds fill in."""

    def __init__(
        self,
        policy: Policy,
        canvas: Canvas,
        cfg: RolloutConfig,
        seed: Seed,
        on_step: OnStep | None,
    ) -> None:
        _check(policy, canvas, cfg)
        device, length = canvas.tokens.device, canvas.completion.shape[1]
        self.policy, self.canvas, self.cfg, self.on_step = policy, canvas, cfg, on_step
        steps = self.steps = steps_per_block(length, cfg)
        self.rule = build_rule(cfg)
        self.schedule = cache(lambda masked: SCHEDULES[cfg.unmask_schedule](masked, steps))
        causal = getattr(policy, "block_length", None) is not None
        self.blocks = Blocks(canvas, cfg.block_length, causal=causal, early_stop=cfg.early_stop)
        self.seed = seed.named(f"rollout/{seed.step}").value
        self.choice_seed = seed.named(f"rollout/{seed.step}/positions").value
        self.suppressed = torch.tensor((canvas.mask_id, *cfg.suppress_tokens), device=device)
        inside = [t for t in (canvas.mask_id, *cfg.suppress_tokens) if t < len(policy.head_weight)]
        self.banned = torch.tensor(inside, dtype=torch.int64, device=device)
        self.stability = Stability.of(policy, cfg, self.banned, len(canvas.tokens))
        self.records = Records(canvas, cfg.top_k if cfg.record_support else None)
        self.num_steps = [blocks * self.steps for blocks in self.blocks.num_blocks]
        self.states = self._states(causal and cfg.use_cache)
        self.stopped: list[tuple[int, int]] = []  # (row, block it stopped after), to be filled

    def _states(self, use_cache: bool) -> States:
        policy, canvas, cfg, tokens = self.policy, self.canvas, self.cfg, self.records.tokens
        fix = fixed_shapes(policy, tokens.device, cfg.cuda_graphs)
        if use_cache:
            counted = self.rule.counted
            return BlockCache(policy, canvas, self.blocks, tokens, counted=counted, fix=fix)
        if cfg.approximate_cache != "none":
            dual = cfg.approximate_cache == "dual"
            return CanvasCache(policy, canvas, self.blocks, tokens, dual=dual)
        batch, guidance = cfg.rollout_batch_size, cfg.cfg_scale > 0
        return WholeCanvas(policy, canvas, tokens, guidance=guidance, batch=batch, fix=fix)

    def run(self) -> Rollouts:
        """Denoises every row, cfg.rollout_batch_size at a time for as long as there are so many."""
        live: list[InFlight] = []
        waiting = deque(range(len(self.num_steps)))
        while waiting or live:
            # a watcher sees one batch after the other
            room = 0 if live and self.on_step is not None else self.cfg.rollout_batch_size
            while waiting and len(live) < room:
                entered = self._from_block(waiting.popleft(), 0)
                live += [] if entered is None else [entered]
            if live:
                live = self._round(live)
            self._fill_stopped()
        records, device = self.records, self.canvas.tokens.device
        logprob, entropy, _ = records.statistics
        return Rollouts(
            self.canvas, records.tokens, records.step_map, logprob, entropy,
            torch.tensor(self.num_steps, dtype=torch.int64, device=device), self.states.num_forwards,
            support=records.support,
        )  # fmt: skip

    def _from_block(self, row: int, block: int) -> InFlight | None:
        """The row at its next block with something to denoise, or None where it has none."""
        for b in range(block, self.blocks.num_blocks[row]):
            left = self.blocks.masked[row][b]
            if left or self.on_step is not None:
                return InFlight(row, b, left, self.schedule(left))
            if self.blocks.ends[row][b]:
                self.stopped.append((row, b))
                return None
        return None

    def _round(self, live: list[InFlight]) -> list[InFlight]:
        """The steps of a block where all rows take as many, else one step. Returns the rows still in flight."""
        counted = self.rule.counted
        self.states.enter(live)
        live.sort(key=InFlight.standing)
        rows, blocks = self._indices([[r.row for r in live], [r.block for r in live]])
        self.states.begin(live, rows, blocks)
        revisions = [] if self.rule.revise is None else self._revisions(live)
        for _ in range(self.steps if counted else 1):
            parts = working(live, self.steps, counted=counted)
            if parts:
                self._step(parts, rows, blocks)
            for run, some, remaining in revisions:
                self._revise(run, some, remaining[:, run[0].step])
            if self.on_step is not None and parts:
                self.on_step(parts[0].tick, self.records.tokens.clone())
            for r in live:
                r.advance(counted=counted)
        return self._close(live, rows, blocks)

    def _step(self, parts: list[Part], rows: Tensor, blocks: Tensor) -> None:
        """Commits positions of every part's rows; nothing here waits for the device."""
        busy = parts[-1].last
        states = self.states.hidden(busy)
        rows = rows[:busy]
        found, exist = self.blocks.columns(blocks[:busy], rows)
        inside = self.blocks.tokens(self.records.tokens, rows, found)
        masked = exist & (inside == self.canvas.mask_id)
        # the masked columns in ascending order; a draw is keyed by its place among them, a matter of this row alone
        order = masked.byte().argsort(dim=1, descending=True, stable=True)
        places = [order[part.rows, : part.left] for part in parts]
        columns = [found[part.rows].gather(1, at) for part, at in zip(parts, places, strict=True)]
        at = places if self.states.block_only else [c + self.canvas.prompt_length for c in columns]
        picked = [self._picked(parts, hidden, at) for hidden in states]
        logits = predicted(self.policy, picked, self.cfg.cfg_scale)
        stable = self._stable(parts, rows, blocks, places, picked, logits)
        logits, support = self._filtered(logits)
        sizes, row_ids = [c.numel() for c in columns], self.canvas.row_ids[rows]
        bounds = self.canvas.entropy_bound
        supports = [None] * len(parts) if support is None else support.split(sizes)
        for part, where, own, kept, calm in zip(
            parts, columns, logits.split(sizes), supports, stable, strict=True
        ):
            moment = Moment(
                part.quota, part.step, self.steps, self.choice_seed, part.tick, row_ids[part.rows], calm,
                None if bounds is None else bounds[rows[part.rows]],
            )  # fmt: skip
            result = self._result(own.unflatten(0, where.shape), moment)
            kept = None if kept is None else kept.unflatten(0, where.shape)
            self.records.commit(rows[part.rows], where, part.tick, result, kept)

    def _picked(self, parts: list[Part], hidden: Tensor, at: list[Tensor]) -> Tensor:
        """(M, D) the states of the positions that may be committed, part after part."""
        picked = []
        for part, columns in zip(parts, at, strict=True):
            own = hidden[part.rows]
            local = torch.arange(len(own), device=own.device)[:, None]
            picked.append(own[local, columns].flatten(0, 1))
        return picked[0] if len(picked) == 1 else torch.cat(picked)

    def _stable(
        self, parts: list[Part], rows: Tensor, blocks: Tensor, places: list[Tensor], picked: list[Tensor],
        logits: Tensor,
    ) -> Sequence[Tensor | None]:  # fmt: skip
        """Of each part, (n, c) bool: the positions whose distribution has stopped moving; None where no rule asks."""
        if self.stability is None:
            return [None] * len(parts)
        device = rows.device
        owners = [torch.arange(part.first, part.last, device=device) for part in parts]
        owner = torch.cat([x.repeat_interleave(p.left) for x, p in zip(owners, parts, strict=True)])
        at = torch.cat([x.flatten() for x in places])
        found = self.stability.update(rows[owner], blocks[owner], at, picked, logits)
        sizes = [x.numel() for x in places]
        return [x.view(own.shape) for x, own in zip(found.split(sizes), places, strict=True)]

    def _filtered(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """(M, V) what candidates are drawn from, and with filters the tokens they leave, (M, K)."""
        support = None
        if is_filtered(self.cfg):
            logits, support = filtered(logits, self.banned, self.cfg)
        if self.rule.tempered and self.cfg.temperature:
            logits = logits.float() / self.cfg.temperature
        return logits, support

    def _result(self, logits: Tensor, at: Moment) -> UnmaskResult:
        """One call of unmask_step on masked positions, and the rule's own choice among its candidates if it has one."""
        rule, temperature = self.rule, self.cfg.temperature
        tokens = torch.full(logits.shape[:2], self.canvas.mask_id, device=logits.device)
        result = unmask_step(
            logits,
            tokens,
            mask_id=self.canvas.mask_id,
            num_unmask=at.quota if rule.choose is None else tokens.shape[1],
            temperature=1.0 if rule.tempered and temperature else temperature,
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

    def _revisions(self, live: list[InFlight]) -> list[tuple[list[InFlight], Tensor, Tensor]]:
        """Rows at the same block and step, their indices, and what the schedule leaves masked after each step."""
        ready = sorted((r for r in live if r.ready), key=lambda r: (r.block, r.step))
        runs = [list(run) for _, run in groupby(ready, key=lambda r: (r.block, r.step))]
        return [
            (run, self._indices([r.row for r in run]), self._indices([r.remaining for r in run]))
            for run in runs
        ]

    def _revise(self, run: list[InFlight], rows: Tensor, remaining: Tensor) -> None:
        """Masks again what the rule takes back."""
        assert self.rule.revise is not None, "called for a rule that takes nothing back"
        step, tick = run[0].step, run[0].block * self.steps + run[0].step
        found, exist = self.blocks.columns(torch.full_like(rows, run[0].block), rows)
        inside = found.clamp(0, self.blocks.length - 1)
        there = rows[:, None], inside
        when = self.records.step_map[there]
        logprob, _, score = self.records.statistics[:, there[0], inside]
        again = self.rule.revise(
            BlockState(
                exist & (when >= 0), when == tick, score, logprob, remaining, step, self.steps,
                remask_key(self.choice_seed, tick), self.canvas.row_ids[rows],
            )
        )  # fmt: skip
        self.records.take_back(rows, inside, again)

    def _close(self, live: list[InFlight], rows: Tensor, blocks: Tensor) -> list[InFlight]:
        """Rows whose block is complete go on to the next one or leave. The one wait for the device of a round."""
        left, ended = self.blocks.look(self.records.tokens, rows, blocks)
        for r, masked in zip(live, left, strict=True):
            r.left = masked
        bad = [r for r in live if r.step == self.steps and r.left]
        if bad:
            block = min(r.block for r in bad)
            raise FloatingPointError(
                "denoise: the policy's logits must offer a candidate for every masked position, got none (NaN, or all "
                f"-inf) in block {block} of rows {sorted(r.row for r in bad if r.block == block)}. "
                "Check the model's weights and dtype."
            )
        early = self.rule.revise is None  # else a complete block may be masked again
        done = [r.step == self.steps or (early and not r.left) for r in live]
        if (self.states.lockstep or self.on_step is not None) and not all(done):
            return live
        staying: list[InFlight | None] = []
        for r, complete, end in zip(live, done, ended, strict=True):
            if complete and end:
                self.stopped.append((r.row, r.block))
            else:
                staying.append(self._from_block(r.row, r.block + 1) if complete else r)
        return [r for r in staying if r is not None]

    def _fill_stopped(self) -> None:
        """Fills the rows that stopped with EOS."""
        if self.stopped and self.canvas.eos_id is not None:
            for row, block in self.stopped:
                self.num_steps[row] = (block + 1) * self.steps
            rows = [row for row, _ in self.stopped]
            taken = self._indices([rows, [self.num_steps[row] for row in rows]])
            self.records.fill(taken[0], self.canvas.eos_id, taken[1])
            self.stopped = []

    def _indices(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.canvas.tokens.device)


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
    check_cache(policy, cfg)
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
