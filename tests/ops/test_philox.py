from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from igpo.ops import _philox


def numpy_philox(key: int, counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x32-10 from the paper's definition, in unbounded Python integers."""
    c, k = list(counter), [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        low = 0xFFFFFFFF
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & low, (p0 >> 32) ^ c[3] ^ k[1], p0 & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


WORD = st.integers(0, 2**32 - 1)


@given(st.integers(0, 2**64 - 1), WORD, WORD, st.integers(-(2**63), 2**63 - 1))
def test_matches_definition(key: int, position: int, index: int, row_id: int) -> None:
    words = _philox.philox(
        key, torch.tensor([position]), torch.tensor([index]), torch.tensor([row_id])
    )
    row = row_id % 2**64
    assert [int(w) for w in words] == numpy_philox(
        key, (position, index, row & 0xFFFFFFFF, row >> 32)
    )


def test_known_answers() -> None:
    """The published known-answer vectors of Random123 for philox4x32-10 (zeros and all ones)."""
    assert numpy_philox(0, (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert numpy_philox(2**64 - 1, (ones,) * 4) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_uniforms_are_uniform_and_open() -> None:
    position = torch.arange(200_000)
    words = _philox.philox(_philox.key(5, 1, 2), position, 0, torch.tensor(9))
    for u in [*map(_philox.uniform, words), _philox.uniform53(words[0], words[1])]:
        assert u.min() > 0
        assert u.max() < 1
        counts = np.histogram(u.numpy(), bins=100, range=(0, 1))[0]
        assert ((counts - 2000) ** 2 / 2000).sum() < 160  # chi-square, 99 degrees: p about 1e-4
    extremes = torch.tensor([0, 2**32 - 1])
    assert _philox.uniform(extremes).tolist() == [2.0**-33, 1 - 2.0**-33]
    assert _philox.uniform53(extremes, extremes).max() < 1


def test_keys_differ_by_seed_step_and_stream() -> None:
    keys = {_philox.key(s, t, r) for s in (-1, 0, 1, 2**63) for t in (0, 1, 2) for r in (1, 2, 3)}
    assert len(keys) == 36
