from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from igpo.config import TrainConfig
from igpo.optim import TrainingError, Updater, learning_rate

CFG = TrainConfig(
    learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=1e9, weight_decay=0.1
)


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)


def loss_of(net: nn.Module, seed: int) -> torch.Tensor:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    return net(x.to(next(net.parameters()).dtype)).float().square().mean()


def train(net: nn.Module, updater: Updater, seeds: range) -> None:
    for seed in seeds:
        loss = loss_of(net, seed)
        loss.backward()
        updater.step(float(loss.detach()), f"step {seed}", list)


def test_a_float32_update_is_adamw_with_decay_on_matrices_only() -> None:
    ours, theirs = model(), model()
    theirs.load_state_dict(ours.state_dict())
    updater = Updater(ours, CFG, 5)
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    plain = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=CFG.learning_rate, betas=(CFG.adam_beta1, CFG.adam_beta2), eps=CFG.adam_epsilon,
    )  # fmt: skip
    train(ours, updater, range(5))
    for seed in range(5):
        plain.zero_grad()
        loss_of(theirs, seed).backward()
        plain.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["constant_with_warmup", "linear", "cosine"])
def test_schedules_are_transformers_without_the_update_at_zero(kind: str) -> None:
    cfg = TrainConfig(learning_rate=0.5, lr_scheduler_type=kind, warmup_steps=4)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    theirs = get_scheduler(kind, optimizer, 4, 12)
    rates = []
    for _ in range(12):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = [learning_rate(update, cfg, 12) for update in range(12)]
    assert ours[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert ours[4:] == pytest.approx(rates[4:])
    assert rates[0] == 0 < ours[0]


def test_constant_has_no_warm_up() -> None:
    assert learning_rate(0, CFG, 10) == learning_rate(9, CFG, 10) == 1e-2


def test_the_gradient_is_clipped_and_its_norm_reported_before() -> None:
    net = model()
    updater = Updater(net, TrainConfig(max_grad_norm=1e-3, lr_scheduler_type="constant"), 1)
    loss = 100 * loss_of(net, 0)
    loss.backward()
    norm = float(torch.cat([p.grad.flatten() for p in net.parameters()]).norm())  # type: ignore[union-attr]
    seen: list[float] = []
    step = updater.optimizer.step
    updater.optimizer.step = lambda *_: (seen.append(updater.gradient_norm()), step())[1]  # type: ignore[method-assign]
    found = updater.step(float(loss.detach()), "here", list)
    assert found["grad_norm"] == pytest.approx(norm)
    assert norm > 1e-3 >= seen[0] * (1 - 1e-5)
    assert seen[0] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_changes_when_something_is_not_finite(where: str, value: float) -> None:
    net = model()
    updater = Updater(net, CFG, 5)
    train(net, updater, range(2))
    before, state = copy.deepcopy(net.state_dict()), copy.deepcopy(updater.state_dict())
    loss = loss_of(net, 3)
    loss.backward()
    if where == "gradient":
        next(net.parameters()).grad[0] = value  # type: ignore[index]
    told = value if where == "loss" else float(loss.detach())
    with pytest.raises(
        TrainingError, match=r"^step 7, inner update 1: the loss is .* Rows: 4, 9\."
    ):
        updater.step(told, "step 7, inner update 1", lambda: [4, 9])
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in before)
    assert updater.done == state["done"]
    moments = updater.state_dict()["weights"]
    for index, saved in state["weights"].items():
        assert all(torch.equal(moments[index][name], saved[name]) for name in saved)


def test_updates_too_small_for_bfloat16_are_not_lost() -> None:
    """200 updates of 1e-5 on weights near 1, whose neighbours in bfloat16 are 2^-7 away."""
    cfg = TrainConfig(learning_rate=1e-5, lr_scheduler_type="constant", weight_decay=0.0)
    net = nn.Linear(4, 4, bias=False)
    nn.init.ones_(net.weight)
    net.to(torch.bfloat16)
    updater = Updater(net, cfg, 200)
    for _ in range(200):
        net(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        updater.step(0.0, "here", list)
    master = updater.masters[0]
    assert master.dtype == torch.float32
    torch.testing.assert_close(master, torch.full((4, 4), 1 - 200e-5), rtol=0, atol=1e-5)
    assert torch.equal(net.weight, master.bfloat16())
    assert net.weight.grad is None


def test_bfloat16_gradients_add_up_in_float32() -> None:
    net = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    updater = Updater(net, CFG, 1)
    for size in (256.0, 1.0, 1.0):  # 256 + 1 is 256 in bfloat16
        (net.weight * size).sum().backward()
    assert updater.gradient_norm() == 258.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_updater_goes_on_bitwise(dtype: torch.dtype) -> None:
    whole, first = model(dtype), model(dtype)
    first.load_state_dict(whole.state_dict())
    cfg = TrainConfig(learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=2)
    train(whole, Updater(whole, cfg, 6), range(6))
    before = Updater(first, cfg, 6)
    train(first, before, range(3))
    second = model(dtype)
    second.load_state_dict(first.state_dict())
    after = Updater(second, cfg, 6)
    after.load_state_dict(before.state_dict())
    train(second, after, range(3, 6))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_frozen_weights_are_left_out() -> None:
    net = model()
    net[0].requires_grad_(False)  # type: ignore[index]
    before = copy.deepcopy(net[0].state_dict())  # type: ignore[index]
    updater = Updater(net, CFG, 1)
    assert len(updater.masters) == 4
    train(net, updater, range(1))
    assert all(torch.equal(net[0].state_dict()[k], before[k]) for k in before)  # type: ignore[index]
