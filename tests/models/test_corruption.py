from __future__ import annotations

import pytest
import torch

from igpo.models.corruption import Absorbing, Corruption, Uniform
from igpo.ops import forward_mask

TOKENS = torch.arange(4000).view(4, 1000) % 7
ALL = torch.ones_like(TOKENS, dtype=torch.bool)
T = torch.tensor([0.0, 0.3, 0.8, 1.0])
PROCESSES: list[Corruption] = [Absorbing(7), Uniform(10), Uniform(10, excluded=(0, 7))]


def test_absorbing_is_forward_mask() -> None:
    found = Absorbing(7).corrupt(TOKENS, ALL, T, seed=3, step=2, exact=True)
    wanted = forward_mask(TOKENS, ALL, T, mask_id=7, seed=3, step=2, exact=True)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_the_same_positions_are_noised_and_the_others_stay(process: Corruption) -> None:
    maskable = torch.rand(4, 1000) < 0.7
    noisy, corrupted = process.corrupt(TOKENS, maskable, T, seed=3, exact=True)
    assert torch.equal(corrupted, Absorbing(7).corrupt(TOKENS, maskable, T, seed=3, exact=True)[1])
    assert torch.equal(corrupted.sum(1), (maskable.sum(1) * T.double()).round().long())
    assert torch.equal(noisy[~corrupted], TOKENS[~corrupted])
    assert not corrupted[~maskable].any()


@pytest.mark.parametrize("excluded", [(), (0, 7), (9,)])
def test_uniform_noise_is_uniform_over_what_is_allowed(excluded: tuple[int, ...]) -> None:
    tokens, everywhere = torch.zeros(20, 2000, dtype=torch.int64), torch.ones(20, 2000).bool()
    noisy, corrupted = Uniform(10, excluded).corrupt(tokens, everywhere, torch.ones(20), seed=1)
    assert corrupted.all()
    counts = noisy.flatten().bincount(minlength=10)
    assert not counts[list(excluded)].any()
    expected = noisy.numel() / (10 - len(excluded))
    chi2 = ((counts[counts > 0] - expected) ** 2 / expected).sum()
    assert chi2 < 30  # 9 degrees of freedom or fewer: p < 1e-3; the seed is fixed


def test_noise_is_independent_of_what_is_noised() -> None:
    noisy, corrupted = Uniform(2).corrupt(
        TOKENS.repeat(5, 1) * 0, ALL.repeat(5, 1), T.repeat(5) * 0 + 0.5, seed=4
    )
    assert noisy[corrupted].double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_a_row_depends_on_its_id_alone() -> None:
    ids = torch.tensor([11, 5, 2**40, 3])
    noisy, _ = Uniform(10).corrupt(TOKENS, ALL, T, seed=3, row_ids=ids)
    some = torch.tensor([2, 1])
    again, _ = Uniform(10).corrupt(TOKENS[some], ALL[some], T[some], seed=3, row_ids=ids[some])
    assert torch.equal(again, noisy[some])
    other, _ = Uniform(10).corrupt(TOKENS, ALL, T, seed=3, step=1, row_ids=ids)
    assert not torch.equal(other[2], noisy[2])


@pytest.mark.parametrize("excluded", [(10,), (-1,), tuple(range(10))])
def test_excluded_tokens_must_leave_some(excluded: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"excluded must be ids in \[0, 10\), not all of them"):
        Uniform(10, excluded)
