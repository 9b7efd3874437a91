"""unmask_step's random draws: laws, tails, keys, and the bits of the Gumbel noise."""

from __future__ import annotations

import math

import pytest
import torch
from gpu import is_slow, on_backend
from unmask_cases import MASK, assert_law, assert_law_at_full_vocabulary, draw

from igpo.ops import _philox, _sampling, unmask_step, use_backend


@pytest.mark.parametrize("sampler", ["icdf", "gumbel"])
@pytest.mark.parametrize(("vocab", "temperature"), [(2, 1.0), (100, 0.6), (100, 1.5)])
def test_frequencies_match_the_softmax(
    backend: str, sampler: str, temperature: float, vocab: int
) -> None:
    row = torch.randn(vocab) * 2
    positions = {"cuda": 150, "triton": 2}[backend] if is_slow(backend) else 8_000
    logits = row.expand(2, positions, vocab)
    rule = {"sampler": sampler, "temperature": temperature, "seed": 5}
    drawn = draw(logits, **rule)
    if is_slow(backend):  # too few for frequencies: one by one
        with use_backend("reference"):
            assert torch.equal(drawn, draw(logits, **rule))
        return
    assert_law(drawn, torch.softmax(row.double() / temperature, -1))


@pytest.mark.parametrize("sampler", ["icdf", "gumbel"])
def test_frequencies_over_several_slices(sampler: str) -> None:
    """A vocabulary of three slices and a bit; what is drawn is compared by groups of 64 tokens."""
    row = torch.randn(12_500) * 3
    with use_backend("cpu"):
        drawn = draw(row.expand(2, 10_000, 12_500), sampler=sampler, seed=1)
    p = torch.softmax(row.double(), -1)
    groups = torch.zeros(196, dtype=torch.float64).index_add(0, torch.arange(12_500) // 64, p)
    assert_law(drawn // 64, groups)
    assert_law(drawn, p)


@pytest.mark.parametrize("sampler", ["icdf", "gumbel"])
def test_tail_of_many_improbable_tokens(sampler: str) -> None:
    """Half the mass on one token, half spread over 8191 tokens of 6e-5 each, none favoured."""
    row = torch.zeros(8192)
    row[3000] = math.log(8191)
    with use_backend("cpu"):
        drawn = draw(row.expand(4, 10_000, 8192), sampler=sampler, seed=2)
    tail = drawn[drawn != 3000]
    assert abs(tail.numel() - 20_000) < 5 * 100  # binomial, standard deviation 100
    tail = tail - (tail > 3000).long()
    assert_law(tail * 64 // 8191, torch.bincount(torch.arange(8191) * 64 // 8191) / 8191)
    assert tail.max() > 8100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("low", "high", "temperature"),
    [(-3.3e38, -3.2e38, 0.5), (3.2e38, 3.3e38, 0.5), (-3.3e38, 3.3e38, 0.1), (0, 1, 1e-38), (0, 1, 1e-42)],
)  # fmt: skip
def test_draws_where_scores_overflow_float32(
    backend: str, dtype: torch.dtype, low: float, high: float, temperature: float
) -> None:
    """logits / temperature is beyond float32, and only float64 tells the tokens apart."""
    logits = (torch.rand(2, 4, 101, dtype=torch.float64) * (high - low) + low).to(dtype)
    rule = {"sampler": "gumbel", "temperature": temperature, "seed": 1}
    with use_backend("reference"):
        expected = draw(logits, **rule)
    assert torch.equal(draw(logits, **rule), expected)


def test_cpu_law_at_full_vocabulary() -> None:
    with use_backend("cpu"):
        assert_law_at_full_vocabulary("icdf", tail=-1.5, calls=25)


def test_uniform_resolves_more_than_32_bits(backend: str) -> None:
    """A token of probability p = u (1 -+ 3e-6), u the smallest of 2^18 uniforms, is not drawn, or drawn.

    The upper 32 bits of that uniform alone would put it outside this interval.
    """
    ids = torch.arange(1 << 18)
    words = _philox.philox(_philox.key(0, 0, _philox.STREAM_TOKEN), torch.zeros_like(ids), 0, ids)
    uniforms = _philox.uniform53(words[0], words[1])
    best = int(uniforms.argmin())
    u = float(uniforms[best])
    assert u < 2.0**-15
    assert abs(float(_philox.uniform(words[0][best])) / u - 1) > 5e-6
    logits = torch.zeros(1, 1, 2)
    for error, token in ((-3e-6, 1), (3e-6, 0)):
        logits[0, 0, 0] = math.log(u) - math.log1p(-u) + error
        assert draw(logits, row_ids=ids[best : best + 1]) == token


def test_noise_resolves_more_than_32_bits() -> None:
    u = torch.tensor([2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    noise = -_sampling.exact_log(-_sampling.exact_log(u))
    want = [-math.log(53 * math.log(2)), -math.log(math.log(2)), 53 * math.log(2)]
    torch.testing.assert_close(noise, torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=0)


def test_draws_as_the_float64_cumulative_sum(many: str) -> None:
    """Up to float32 rounding at the boundaries, whatever the shape of the distribution."""
    disagree = total = 0
    rows = {"cuda": 8, "triton": 1}[many] if is_slow(many) else 500
    for scale, vocab in ((0.0, 4500), (3.0, 4500), (12.0, 4500), (3.0, 257), (1.0, 5)):
        logits = torch.randn(2, rows, vocab) * scale
        ours = draw(logits, temperature=1.3, seed=9)
        with use_backend("reference"):
            theirs = draw(logits, temperature=1.3, seed=9)
        disagree += int((ours != theirs).sum())
        total += ours.numel()
    assert disagree <= total // 1000, f"{disagree} of {total} draws differ from the float64 sum"


@pytest.fixture(params=["cpu", "triton", "cuda"])
def many(request: pytest.FixtureRequest):
    """The backends that are not the reference."""
    with on_backend(request.param, "unmask_step"):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpu_gumbel_draws_the_same_tokens(gpu_backend: str, dtype: torch.dtype) -> None:
    for vocab, scale, temperature in ((31, 0.0, 1.9), (4133, 3.0, 0.7), (4600, 30.0, 1e-3)):
        shape = (2, 1) if is_slow(gpu_backend) else (20, 30)
        logits = (torch.randn(*shape, vocab) * scale).to(dtype)
        logits[0, 0, : vocab // 2] = -torch.inf
        rule = {"sampler": "gumbel", "temperature": temperature, "seed": -7, "step": 3}
        rule["row_ids"] = torch.arange(shape[0]) * (2**40 + 1) - 5
        ours = draw(logits, **rule)
        with use_backend("reference"):
            assert torch.equal(ours, draw(logits, **rule))


@pytest.mark.parametrize("scale", [1e12, 3e38])
def test_gumbel_draws_where_the_noise_is_lost_in_rounding(gpu_backend: str, scale: float) -> None:
    """logits / temperature so large that the noise changes its last bits, or none: ties go to the lower token."""
    logits = torch.full((1, 2, 40), scale)
    logits[0, 1, ::3] *= 1 - 2.0**-24
    ours = draw(logits, sampler="gumbel", temperature=0.9)
    with use_backend("reference"):
        assert torch.equal(ours, draw(logits, sampler="gumbel", temperature=0.9))


@pytest.mark.parametrize(
    ("dtype", "temperature"),
    [
        (torch.float32, 1e-3),
        (torch.float32, 1.9),
        (torch.bfloat16, 0.7),
        (torch.float16, 1.0),
    ],
    ids=str,
)
def test_gumbel_draws_the_same_tokens_everywhere(
    isa: str, dtype: torch.dtype, temperature: float
) -> None:
    for vocab, scale in ((1, 1.0), (31, 0.0), (4133, 3.0), (9001, 0.1), (4096, 30.0)):
        logits = (torch.randn(2, 3, vocab) * scale).to(dtype)
        logits[0, 0, : vocab // 2] = -torch.inf
        rule = {"sampler": "gumbel", "temperature": temperature, "seed": -7, "step": 3}
        rule["row_ids"] = torch.tensor([2**40 + 1, -5])
        ours = draw(logits, **rule)
        with use_backend("reference"):
            assert torch.equal(ours, draw(logits, **rule))


def test_gumbel_bits() -> None:
    """The noise of five tokens, bit for bit, so that no backend's definition moves unseen."""
    key, position, row = _philox.key(1, 2, 3), torch.tensor([0, 9]), torch.tensor([4, 2**33])
    noise = _sampling.gumbel(key, position, row, 5)
    assert noise.shape == (2, 5)
    assert [x.hex() for x in noise[1].tolist()] == [
        "0x1.b3cc84eb5dceap-1",
        "0x1.19afa9abe76aep+1",
        "0x1.c5172ededa69ep+1",
        "0x1.8cce4df97fe4bp-2",
        "-0x1.3c0b443f1bf44p+0",
    ]
    for token in range(5):
        words = _philox.philox(key, position, token // 2, row)
        u = _philox.uniform53(words[token % 2 * 2], words[token % 2 * 2 + 1])
        want = [-math.log(-math.log(x)) for x in u.tolist()]
        torch.testing.assert_close(
            noise[:, token], torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=0
        )


def test_exact_log_is_a_logarithm() -> None:
    u = torch.cat(
        [
            torch.logspace(-300, 300, 4001, dtype=torch.float64),
            1 - torch.logspace(-16, -1, 4001).double(),
        ]
    )
    truth = torch.tensor([math.log(x) for x in u.tolist()], dtype=torch.float64)
    kept = truth != 0
    error = ((_sampling.exact_log(u) - truth)[kept] / truth[kept]).abs().max()
    assert error < 1e-13
    assert _sampling.exact_log(torch.ones(1, dtype=torch.float64)) == 0


@pytest.mark.parametrize("sampler", ["icdf", "gumbel"])
@pytest.mark.parametrize("confidence", ["prob", "random"])
def test_a_row_draws_the_same_in_any_batch(backend: str, sampler: str, confidence: str) -> None:
    length = 1 if is_slow(backend) else 3
    logits, tokens = torch.randn(4, length, 4200), torch.full((4, length), MASK)
    tokens[2:, 0] = tokens[:, 1:2] = 1
    ids = torch.tensor([7, 2**35, -3, 0])
    rule = {"mask_id": MASK, "num_unmask": 2, "temperature": 0.9, "confidence": confidence}
    rule |= {"sampler": sampler, "seed": 3, "step": 8}
    whole = unmask_step(logits, tokens, row_ids=ids, **rule)
    order = torch.tensor([3, 0, 2, 1])
    moved = unmask_step(logits[order], tokens[order], row_ids=ids[order], **rule)
    alone = [
        unmask_step(logits[b : b + 1], tokens[b : b + 1], row_ids=ids[b : b + 1], **rule)
        for b in range(4)
    ]
    for i, name in enumerate(whole._fields):
        assert torch.equal(whole[i][order], moved[i]), name
        assert torch.equal(whole[i], torch.cat([step[i] for step in alone])), name


def test_row_ids_count_the_sequences_when_none_are_given(backend: str) -> None:
    logits = torch.zeros(3, 1, 1000)
    assert torch.equal(draw(logits), draw(logits, row_ids=torch.arange(3)))
    assert draw(logits).unique().numel() == 3


@pytest.mark.parametrize("sampler", ["icdf", "gumbel"])
def test_draws_depend_on_seed_step_row_and_position(backend: str, sampler: str) -> None:
    length = 1 if is_slow(backend) and backend == "triton" else 30
    logits = torch.zeros(2, length, 1000)
    base = {"sampler": sampler, "seed": 1, "step": 1, "row_ids": torch.tensor([3, 4])}
    tokens = draw(logits, **base)
    assert torch.equal(tokens, draw(logits, **base))
    assert (tokens[0] == tokens[1]).float().mean() < 0.1
    assert tokens[0].unique().numel() > 0.8 * length
    for change in ({"seed": 2}, {"step": 2}, {"row_ids": torch.tensor([3 + 2**32, 5])}):
        other = draw(logits, **(base | change))
        assert (tokens == other).float().mean() < 0.1, change


def test_random_confidence_is_uniform_and_independent_of_the_token(backend: str) -> None:
    logits, tokens = torch.randn(20, 1000, 2), torch.full((20, 1000), MASK)
    rule = {"mask_id": MASK, "num_unmask": 1000, "temperature": 1.0, "confidence": "random"}
    if is_slow(backend):  # the same numbers, then
        tokens[:, 3:] = tokens[2:] = 3
        step = unmask_step(logits, tokens, **rule)
        with use_backend("reference"):
            want = unmask_step(logits, tokens, **rule)
        assert torch.equal(step.score, want.score)
        assert torch.equal(step.tokens, want.tokens)
        return
    step = unmask_step(logits, tokens, **rule)
    assert step.score.min() > 0
    assert step.score.max() < 1
    assert_law((step.score * 50).long(), torch.full((50,), 1 / 50))
    mean = [step.score[step.tokens == v].mean().item() for v in (0, 1)]
    assert abs(mean[0] - mean[1]) < 5 * math.sqrt(2 / 12 / 10_000)
