"""Seed the random generators of many shards at once.

NumPy takes 9 us to seed a generator, most of it in `SeedSequence`. Our seeds differ only in their
last word, so this module vectorises the hash of `SeedSequence` over the last words. NumPy
guarantees that the streams of `SeedSequence` and `PCG64` never change. tests/data/test_order.py
compares the results.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

_POOL_WORDS = 4
_POOL_HASHES = 16
"""Number of hashes in `SeedSequence` for the first four words. Each further word takes four."""
_MIX = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
_ENTROPY_HASH = 0x43B0D7E5, 0x931E8875
_STATE_HASH = 0x8B51F9DD, 0x58F38DED
_SHIFT = np.uint32(16)


def generators(shared: NDArray[np.uint32], last: NDArray[np.uint32]) -> Iterator[Generator]:
    """Yield `default_rng([*shared, number])` for each `number` in `last`.

    Args:
        shared: first words of every seed, [at least 4].
        last: last word of each seed, [seeds].
    """
    pool = SeedSequence(shared).pool[:, None]
    constants = _constants(_ENTROPY_HASH, _POOL_HASHES + _POOL_WORDS * (len(shared) - _POOL_WORDS))
    hashed = _hash(np.broadcast_to(last, (_POOL_WORDS, len(last))), constants)
    pool = pool * _MIX[0] - hashed * _MIX[1]
    pool ^= pool >> _SHIFT
    states = _hash(np.concatenate([pool, pool]), _constants(_STATE_HASH, 0))
    for words in np.ascontiguousarray(states.T).view(np.uint64):
        yield Generator(PCG64(_Words(words)))  # type: ignore[arg-type]


class _Words(ISeedSequence):
    """Seed sequence that returns precomputed words of a `SeedSequence`."""

    def __init__(self, words: NDArray[np.uint64]) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: object = np.uint32) -> NDArray[np.uint64]:
        """Return the words. PCG64 requests four of 64 bits."""
        return self._words


def _hash(words: NDArray[np.uint32], constants: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Hash of each word, [rows, seeds]; the constants advance from row to row."""
    rows = len(words)
    hashed = (words ^ constants[:rows]) * constants[1 : rows + 1]
    return hashed ^ (hashed >> _SHIFT)


def _constants(start_and_factor: tuple[int, int], hashes: int) -> NDArray[np.uint32]:
    """Constants of the eight hashes that follow the first `hashes`, [9, 1]."""
    start, factor = start_and_factor
    powers = [start * pow(factor, hashes + step, 1 << 32) for step in range(9)]
    return np.array([power & 0xFFFFFFFF for power in powers], np.uint32)[:, None]
