"""What a rollout spends: model calls, rows of the head, host synchronisations; and rows that stop early."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from toys import EOS, VOCAB, before_step, canvases, early_script, hinted, small_decoder

from igpo.canvas import with_hints
from igpo.config import RolloutConfig
from igpo.models import MaskedDecoder
from igpo.rollout import denoise, guidance
from igpo.types import GIVEN, Seed

CFG = RolloutConfig(max_completion_length=16, block_length=8, diffusion_steps=8, temperature=1.0)


@pytest.fixture(scope="module")
def decoder() -> MaskedDecoder:
    return small_decoder()


def test_a_row_stops_after_a_block_of_eos() -> None:
    cfg = RolloutConfig(16, block_length=4, diffusion_steps=8, temperature=0.0)
    plain = canvases(generations=1, ends=(0, 1, 2, 3))
    hint_mask = torch.zeros(4, 16, dtype=torch.bool)
    hint_mask[:, 9] = True
    canvas = with_hints(plain, torch.full((4, 16), 6), hint_mask)
    rollouts = denoise(early_script(), canvas, cfg, Seed(0))
    assert rollouts.num_steps.tolist() == [8, 4, 2, 8]
    assert rollouts.num_forwards == 8 + 4 + 2 + 8
    assert (rollouts.completion[1, 4:] == torch.tensor([EOS] * 5 + [6] + [EOS] * 6)).all()
    assert (rollouts.step_map[1, 8:] == torch.tensor([4, GIVEN, 4, 4, 4, 4, 4, 4])).all()
    assert (rollouts.step_map[2, 4:9] == 2).all()
    assert rollouts.completion[3].tolist() == [3, EOS, EOS, EOS, *[3] * 5, 6, *[3] * 6]
    assert not rollouts.commit_logprob[1, 8:].any()
    for c, never in ((canvas, replace(cfg, early_stop=False)), (replace(canvas, eos_id=None), cfg)):
        full = denoise(early_script(), c, never, Seed(0))
        assert full.num_steps.tolist() == [8] * 4
        assert full.completion[1, 8:].tolist() == [3, 6, *[3] * 6]
        assert torch.equal(full.tokens[[0, 3]], rollouts.tokens[[0, 3]])


def test_trajectory_rebuilds_canvases_of_stopped_rows() -> None:
    seen: dict[int, Tensor] = {}
    cfg = RolloutConfig(16, block_length=4, diffusion_steps=8, temperature=0.0)
    canvas = canvases(generations=1, ends=(0, 1, 2, 3))
    rollouts = denoise(early_script(), canvas, cfg, Seed(0), on_step=seen.__setitem__)
    for step, tokens in seen.items():
        assert torch.equal(before_step(rollouts, step + 1), tokens)


class HeadRows(TorchDispatchMode):
    """Rows of matrix products that end in the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (
            func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            and out.shape[-1] == VOCAB
        ):
            self.rows += out.shape[0]
        return out


def test_only_masked_positions_of_the_active_block_pass_the_head(
    decoder: MaskedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guidance, "MIN_ROWS", 0)  # else a few rows more on a CPU
    canvas = hinted(canvases())
    with HeadRows() as head:
        rollouts = denoise(decoder, canvas, replace(CFG, early_stop=False), Seed(0))
    masked = 0
    for step in range(8):
        now = (rollouts.step_map >= step)[:, 8 * (step // 4) : 8 * (step // 4) + 8]
        working = (rollouts.step_map == step).any(1)
        masked += int(now[working].sum())
    assert head.rows == masked


def test_rows_with_nothing_to_commit_are_not_forwarded(decoder: MaskedDecoder) -> None:
    canvas = canvases(generations=1)
    hint_mask = torch.zeros(3, 16, dtype=torch.bool)
    hint_mask[0, :8] = True  # a whole block
    hint_mask[1, 1:8] = True  # all but one position: busy in one step of four
    rows = []
    forward = decoder.hidden

    class Spy:
        head_weight, head_bias = decoder.head_weight, None

        def hidden(self, tokens: Tensor, *rest: Tensor) -> Tensor:
            rows.append(len(tokens))
            return forward(tokens, *rest)

    hints = torch.full((3, 16), 2)
    rollouts = denoise(Spy(), with_hints(canvas, hints, hint_mask), CFG, Seed(0))
    # row 0 begins with its second block
    assert rows == [3, 2, 2, 2, 2, 2, 2, 2]
    assert rollouts.num_forwards == sum(rows)


class HostReads(TorchFunctionMode):
    """Calls that make the host wait for a device; a tensor made of Python numbers is copied there."""

    NAMES = (
        "tolist",
        "item",
        "__bool__",
        "__int__",
        "__index__",
        "__float__",
        "nonzero",
        "cpu",
        "numpy",
        "unique",
        "tensor",
        "as_tensor",
    )

    def __init__(self) -> None:
        super().__init__()
        self.count, self.paused = 0, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.paused:
            return func(*args, **(kwargs or {}))
        masks = func is Tensor.__getitem__ and any(
            isinstance(i, Tensor) and i.dtype == torch.bool
            for i in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        made = func is not torch.as_tensor or not isinstance(args[0], Tensor)
        self.count += masks or (made and getattr(func, "__name__", "") in self.NAMES)
        return func(*args, **(kwargs or {}))


class Unwatched:
    """The decoder's own reads do not count: on a CPU it packs by them, elsewhere it has none (tests/models)."""

    head_bias = None

    def __init__(self, decoder: MaskedDecoder, host: HostReads) -> None:
        self.decoder, self.host, self.head_weight = decoder, host, decoder.head_weight

    def hidden(self, *args: Tensor) -> Tensor:
        self.host.paused = True
        states = self.decoder.hidden(*args)
        self.host.paused = False
        return states


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"remasking": "rcr"},
        {"alg_temp": 0.5, "top_k": 5, "cfg_scale": 0.5},
        {"defer_tokens": (EOS,), "unmask_schedule": "dream"},
    ],
    ids=["plain", "rcr", "drawn", "deferred"],
)
def test_the_host_waits_twice_a_round_and_never_a_step(
    decoder: MaskedDecoder, change: dict
) -> None:
    """Once to say who works, once to ask who stopped; rcr a second time for what each group of rows leaves masked."""

    def reads(steps: int, blocks: int, rows: int = 9) -> int:
        cfg = replace(
            CFG, diffusion_steps=steps, block_length=16 // blocks, rollout_batch_size=rows
        )
        with HostReads() as host:
            denoise(Unwatched(decoder, host), canvases(), replace(cfg, **change), Seed(0))
        return host.count

    a_round = 4 if change.get("remasking") else 2
    base = reads(1, 1)
    assert reads(16, 1) == base
    assert reads(16, 4) - base == 3 * a_round
    assert reads(16, 1, rows=3) - base == 2 * a_round
    assert base <= 10 + a_round  # of the call


class Noisy(nn.Module):
    """A module policy whose dropout would show."""

    head_bias = None

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5).eval()
        self.head_weight = nn.Parameter(torch.eye(VOCAB))

    def hidden(self, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return self.dropout(torch.ones(*tokens.shape, VOCAB))


def test_policy_runs_in_eval_mode_without_gradients_and_gets_its_modes_back() -> None:
    policy = Noisy().train()
    policy.frozen.eval()
    rollouts = denoise(policy, canvases(), CFG, Seed(0))
    assert (policy.training, policy.dropout.training, policy.frozen.training) == (True, True, False)
    assert not rollouts.commit_logprob.requires_grad
    uniform = -torch.log(torch.tensor(VOCAB - 1.0))
    torch.testing.assert_close(rollouts.commit_logprob, uniform.expand(9, 16), rtol=0, atol=1e-5)
