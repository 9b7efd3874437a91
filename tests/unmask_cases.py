"""What the tests of unmask_step share: examples, comparisons, and the test of a law."""

from __future__ import annotations

import math

import torch

from igpo.ops import UnmaskResult, unmask_step

MASK = 1_000_000  # beyond every vocabulary here: a commit can never look like a mask
CONFIDENCES = ["prob", "margin", "entropy", "random"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def example(
    batch: int, length: int, vocab: int, dtype: torch.dtype = torch.float32, scale: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, tokens, eligible), about three quarters masked, nine tenths of these eligible."""
    logits = (torch.randn(batch, length, vocab) * scale).to(dtype)
    tokens = torch.where(torch.rand(batch, length) < 0.75, MASK, 3)
    return logits, tokens, torch.rand(batch, length) < 0.9


def assert_same(got: UnmaskResult, want: tuple) -> None:
    assert torch.equal(got.tokens, want[0])
    assert torch.equal(got.committed, want[1])
    for name, a, b in zip(("score", "logprob", "entropy"), got[2:], want[2:], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(
            a.double(), b.double(), atol=5e-6, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def draw(logits: torch.Tensor, **rule) -> torch.Tensor:
    tokens = torch.full(logits.shape[:2], MASK)
    rule = {"mask_id": MASK, "num_unmask": logits.shape[1], "temperature": 1.0} | rule
    return unmask_step(logits, tokens, **rule).tokens


def chi_square(drawn: torch.Tensor, p: torch.Tensor) -> tuple[float, int]:
    """The statistic and its degrees of freedom; tokens expected fewer than 10 times share a bin."""
    expected = p * drawn.numel()
    counts = torch.bincount(drawn.flatten(), minlength=p.numel()).double()
    rare = expected < 10
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    kept = expected > 1
    assert counts[~kept].sum() <= 12  # what is not tested is rare
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum()), int(kept.sum()) - 1


def assert_law(drawn: torch.Tensor, p: torch.Tensor) -> None:
    statistic, degrees = chi_square(drawn, p)
    limit = degrees + 3.7 * math.sqrt(2 * degrees) + 10  # p-value below 1e-4 (Laurent-Massart)
    assert statistic < limit, f"chi-square {statistic:.1f} with {degrees} degrees of freedom"


def assert_law_at_full_vocabulary(sampler: str, tail: float, calls: int) -> None:
    """V = 126464, 2000 draws a call: by groups of 64 tokens, and among the many improbable tokens (logit `tail`)."""
    vocab = 126_464
    row = torch.randn(vocab) * 2
    row[::2] = tail  # half of the tokens, none favoured
    logits = row.bfloat16().expand(1, 2000, vocab)
    drawn = torch.cat([draw(logits, sampler=sampler, seed=seed) for seed in range(calls)])
    p = torch.softmax(row.bfloat16().double(), -1)
    groups = p.new_zeros(vocab // 64).index_add(0, torch.arange(vocab) // 64, p)
    assert_law(drawn // 64, groups)
    improbable = drawn[(drawn % 2 == 0)] // 2
    assert improbable.numel() > 1000
    assert_law(improbable * 64 // (vocab // 2), torch.full((64,), 1 / 64).double())
