"""Which caption of a sample is due, where a stream mixes captions of several roles.

The draw is a pure function of the seed, the stream, the place of the sample and the number of
passes over the stream, so ranks, workers and resumes do not change it. Draws are not independent:
they follow additive recurrences with badly approximable numbers. So the captions of a shard in one
pass, and those of a sample over many passes, have the wanted shares up to a few captions, where
independent draws would be off by the square root of their number.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

_BITS = 64
_GOLDEN = 0x9E3779B97F4A7C15
"""Fractional part of the golden ratio in units of 2^-64: the step from sample to sample."""
_SILVER = 0x6A09E667F3BCC908
"""Fractional part of the square root of two in units of 2^-64: the step from pass to pass."""
_SHARD = 0xD1B54A32D192ED03
"""Odd constant of a multiplicative hash of the shard's number."""


class CaptionMixture:
    """Draws captions of one stream by the shares of their roles."""

    def __init__(self, shares: Mapping[str, float], seed: int, stream: str) -> None:
        self._shares = {role: share for role, share in shares.items() if share > 0}
        self._ranks = {role: rank for rank, role in enumerate(self._shares)}
        self._start = zlib.crc32(f"{seed}/{stream}".encode()) << 32

    def draw(self, roles: Sequence[str], shard: int, index: int, passing: int) -> int:
        """Number of the due caption.

        Captions of the same role share its part equally. A role that the sample lacks leaves its
        part to the others in proportion. A sample without any role of the mixture gives any of its
        captions.

        Args:
            roles: role of each caption, at least one.
            shard: number of the shard.
            index: place of the sample in the shard.
            passing: number of complete passes over the stream.
        """
        order = [number for number, role in enumerate(roles) if role in self._shares]
        order.sort(key=lambda number: self._ranks[roles[number]])
        parts = [self._shares[roles[number]] / roles.count(roles[number]) for number in order]
        if not order:
            order, parts = list(range(len(roles))), [1.0] * len(roles)
        left = self._uniform(shard, index, passing) * sum(parts)
        for number, part in zip(order, parts, strict=True):
            left -= part
            if left < 0:
                return number
        return order[-1]

    def is_lacking(self, roles: Sequence[str]) -> bool:
        """Whether a sample lacks a role of the mixture."""
        return not self._shares.keys() <= set(roles)

    def _uniform(self, shard: int, index: int, passing: int) -> float:
        """Value in [0, 1)."""
        start = self._start + _mixed(shard)
        value = (start + index * _GOLDEN + passing * _SILVER) % (1 << _BITS)
        return (value >> 11) / (1 << 53)


def _mixed(shard: int) -> int:
    """Pseudo-random 64 bits for a shard (SplitMix64's finalizer)."""
    value = (shard + 1) * _SHARD % (1 << _BITS)
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % (1 << _BITS)
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % (1 << _BITS)
    return value ^ (value >> 31)
