"""Choose one caption of each sample in a stream that mixes captions of several roles.

The choice is a pure function of the seed, the stream, the position of the sample and the number of
passes over the stream. The number of ranks, the number of workers and a resume do not change it.

The random numbers are low-discrepancy sequences (additive recurrences with badly approximable
numbers), not independent draws. The counts of the roles in one pass over a shard, or in many passes
over one sample, differ from the configured shares by a few captions. With n independent draws, the
difference would grow like sqrt(n).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

_BITS = 64
_GOLDEN = 0x9E3779B97F4A7C15
"""Fractional part of the golden ratio in units of 2^-64. Increment from sample to sample."""
_SILVER = 0x6A09E667F3BCC908
"""Fractional part of the square root of two in units of 2^-64. Increment from pass to pass."""
_SHARD = 0xD1B54A32D192ED03
"""Odd constant of a multiplicative hash of the shard's number."""


class CaptionMixture:
    """Chooses captions of one stream in proportion to the shares of their roles."""

    def __init__(self, shares: Mapping[str, float], seed: int, stream: str) -> None:
        self._shares = {role: share for role, share in shares.items() if share > 0}
        self._ranks = {role: rank for rank, role in enumerate(self._shares)}
        self._start = zlib.crc32(f"{seed}/{stream}".encode()) << 32

    def draw(self, roles: Sequence[str], shard: int, index: int, passing: int) -> int:
        """Choose a caption and return its index.

        Captions of the same role divide its share equally. If the sample lacks a role, the shares
        of the other roles grow in proportion. If it has no role of the mixture, all of its captions
        are equally likely.

        Args:
            roles: role of each caption, at least one.
            shard: index of the shard.
            index: index of the sample in the shard.
            passing: number of complete passes over the stream.
        """
        order = [number for number, role in enumerate(roles) if role in self._shares]
        order.sort(key=lambda number: self._ranks[roles[number]])
        parts = [self._shares[roles[number]] / roles.count(roles[number]) for number in order]
        if not order:
            order, parts = list(range(len(roles))), [1.0] * len(roles)
        remaining = self._uniform(shard, index, passing) * sum(parts)
        for number, part in zip(order, parts, strict=True):
            remaining -= part
            if remaining < 0:
                return number
        return order[-1]

    def is_lacking(self, roles: Sequence[str]) -> bool:
        """Whether a sample lacks a role of the mixture."""
        return not self._shares.keys() <= set(roles)

    def _uniform(self, shard: int, index: int, passing: int) -> float:
        """Value in [0, 1) of the low-discrepancy sequence."""
        start = self._start + _mixed(shard)
        value = (start + index * _GOLDEN + passing * _SILVER) % (1 << _BITS)
        return (value >> 11) / (1 << 53)


def _mixed(shard: int) -> int:
    """64-bit hash of a shard's number (SplitMix64's finalizer)."""
    value = (shard + 1) * _SHARD % (1 << _BITS)
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % (1 << _BITS)
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % (1 << _BITS)
    return value ^ (value >> 31)
