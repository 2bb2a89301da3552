"""Which sample comes when: a pure function of the seed, the epoch and the position in it.

Ranks, workers and earlier reads do not change it, and nothing needs to be read to find out. So a
run resumes anywhere at once, and any number of ranks sees the same global order.

Shards are fetched whole and sets may be larger than memory, so shuffling has two stages. All shards
of all streams are shuffled and cut into blocks of about `block_samples`, then the samples of a
block are shuffled together. Smaller sets are one block, shuffled perfectly.

Memory grows with the shards (28 bytes each) and the block (8 bytes a sample), not with the samples
of an epoch.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_PASS, _SHARD, _EPOCH, _BLOCK = range(4)  # keep the uses of the seed apart


@dataclass(frozen=True)
class StreamShape:
    """What the order needs to know of a stream."""

    name: str
    shard_samples: Sequence[int] | NDArray[np.int64]
    """Samples of each shard: images, or captions where an epoch reads each of them once."""
    samples_per_epoch: int
    offset: int = 0
    """Place in the stream's row of passes at which epoch 0 begins, see `course.Part`."""


@dataclass(frozen=True)
class Slot:
    """A sample by its place: the number of its stream, shard and place in the shard."""

    stream: int
    shard: int
    sample: int
    passing: int
    """Number of complete passes over the stream before this one; decides which caption is due."""


class _Piece(NamedTuple):
    """The part of a shard that an epoch reads: a range of the shard's own permutation."""

    stream: int
    shard: int
    passing: int
    start: int
    stop: int


_PIECE = np.dtype([(name, np.int32) for name in _Piece._fields])


class SampleOrder:
    """The endless order of samples over the streams.

    A stream is an endless row of passes, each of them through all of its shards in an order of its
    own; every epoch takes the next `samples_per_epoch` of the row. So an epoch of as many samples
    as the stream has reads each of them once, twice as many twice, and half as many a different
    half in each of two epochs.
    """

    def __init__(self, streams: Sequence[StreamShape], seed: int, block_samples: int):
        self.samples_per_epoch = sum(stream.samples_per_epoch for stream in streams)
        self._streams = tuple(streams)
        self._sizes = [np.asarray(stream.shard_samples, np.int64) for stream in streams]
        self._seed = seed
        self._block_samples = block_samples
        self._epoch = -1
        self._pieces = np.zeros(0, _PIECE)
        """Pieces of the epoch in their order."""
        self._starts: NDArray[np.int64] = np.zeros(1, np.int64)
        """First position of each piece, and the end of the epoch."""
        self._block_range = range(0)
        self._block_first = 0
        """Number of the block's first piece."""
        self._block_ends: list[int] = []
        """End of each of the block's pieces, counted in samples from the start of the block."""
        self._block = 0
        """Number of the block in the epoch."""
        self._block_rows: NDArray[np.int64] | None = None
        """For each position of the block, the sample's place in the row of the block's pieces; None
        until it is needed."""
        self._piece_orders: dict[int, NDArray[np.int64]] = {}
        """Order of samples inside those pieces of the block that were asked for."""

    def locate(self, epoch: int, position: int) -> Slot:
        """The sample at `position` of `epoch`, 0 <= position < samples_per_epoch."""
        self._enter(epoch, position)
        row = int(self._rows()[position - self._block_range.start])
        number = bisect_right(self._block_ends, row)
        place = row - (self._block_ends[number - 1] if number else 0)
        piece = _Piece(*self._pieces[self._block_first + number].item())
        if number not in self._piece_orders:
            self._piece_orders[number] = self._order_of(piece)
        sample = int(self._piece_orders[number][place])
        return Slot(piece.stream, piece.shard, sample, piece.passing)

    def block_of(self, epoch: int, position: int) -> tuple[int, int]:
        """The block that holds a position, as its epoch and first position."""
        self._enter(epoch, position)
        return epoch, self._block_range.start

    def upcoming(
        self, epoch: int, position: int, by_use: bool = True
    ) -> Iterator[list[tuple[int, int]]]:
        """Stream and shard of what is read from a position on, block after block, for ever.

        With `by_use`, the first list holds what the rest of the block reads, by first use. The
        others hold all that a block reads, in no particular order, which takes less time.
        """
        while True:
            self._enter(epoch, position)
            if by_use:
                pieces = self._pieces[self._used_pieces(position)]
            else:
                last = self._block_first + len(self._block_ends)
                pieces = self._pieces[self._block_first : last]
            shards = zip(pieces["stream"].tolist(), pieces["shard"].tolist(), strict=True)
            position = self._block_range.stop
            if position == self.samples_per_epoch:
                epoch, position = epoch + 1, 0
            by_use = False
            yield list(dict.fromkeys(shards))

    def _enter(self, epoch: int, position: int) -> None:
        """Find the epoch and the block of a position, unless it is in those of the last call."""
        if not 0 <= position < self.samples_per_epoch:
            raise IndexError(f"position {position} in an epoch of {self.samples_per_epoch} samples")
        if epoch != self._epoch:
            self._enter_epoch(epoch)
        if position not in self._block_range:
            self._enter_block(position)

    def _used_pieces(self, position: int) -> NDArray[np.int64]:
        """Numbers of the pieces that the rest of the block reads, by first use."""
        rows = self._rows()[position - self._block_range.start :]
        count = len(self._block_ends)
        piece_of_row = np.repeat(np.arange(count), np.diff(self._block_ends, prepend=0))
        first_use = np.full(count, len(rows))
        # Of the places that an index is assigned, the last one stays: backwards, the first use.
        first_use[piece_of_row[rows[::-1]]] = np.arange(len(rows))[::-1]
        by_use = np.argsort(first_use, kind="stable")
        return self._block_first + by_use[: np.count_nonzero(first_use < len(rows))]

    def _enter_epoch(self, epoch: int) -> None:
        pieces = np.concatenate(
            [self._stream_pieces(number, epoch) for number in range(len(self._streams))]
        )
        self._pieces = pieces[self._rng(_EPOCH, epoch).permutation(len(pieces))]
        self._starts = np.zeros(len(pieces) + 1, np.int64)
        np.cumsum(self._pieces["stop"] - self._pieces["start"], out=self._starts[1:])
        self._block_range = range(0)
        self._epoch = epoch

    def _stream_pieces(self, number: int, epoch: int) -> NDArray[np.void]:
        """The pieces of a stream in an epoch, pass after pass."""
        stream, sizes = self._streams[number], self._sizes[number]
        samples = int(sizes.sum())
        begin = stream.offset + stream.samples_per_epoch * epoch
        end = begin + stream.samples_per_epoch
        passes = []
        for passing in range(begin // samples, -(-end // samples)):
            rng = self._rng(_PASS, zlib.crc32(stream.name.encode()), passing)
            shards = rng.permutation(len(sizes))
            lengths = sizes[shards]
            offsets = passing * samples + np.cumsum(lengths) - lengths
            starts = np.maximum(begin - offsets, 0)
            stops = np.minimum(end - offsets, lengths)
            is_read = starts < stops
            pieces = np.empty(np.count_nonzero(is_read), _PIECE)
            pieces["stream"], pieces["passing"] = number, passing
            pieces["shard"] = shards[is_read]
            pieces["start"], pieces["stop"] = starts[is_read], stops[is_read]
            passes.append(pieces)
        return np.concatenate(passes)

    def _enter_block(self, position: int) -> None:
        """Find the block that holds `position`: the pieces that start in its span."""
        piece = int(np.searchsorted(self._starts, position, side="right")) - 1
        self._block = int(self._starts[piece]) // self._block_samples
        span = np.array([self._block, self._block + 1]) * self._block_samples
        first, last = np.searchsorted(self._starts[:-1], span, side="left").tolist()
        self._block_range = range(int(self._starts[first]), int(self._starts[last]))
        self._block_first = first
        self._block_ends = (self._starts[first + 1 : last + 1] - self._starts[first]).tolist()
        self._block_rows = None
        self._piece_orders = {}

    def _rows(self) -> NDArray[np.int64]:
        if self._block_rows is None:
            rng = self._rng(_BLOCK, self._epoch, self._block)
            self._block_rows = rng.permutation(len(self._block_range))
        return self._block_rows

    def _order_of(self, piece: _Piece) -> NDArray[np.int64]:
        """Numbers of the samples of a piece, in their order."""
        name = zlib.crc32(self._streams[piece.stream].name.encode())
        rng = self._rng(_SHARD, name, piece.passing, piece.shard)
        samples = rng.permutation(int(self._sizes[piece.stream][piece.shard]))
        return samples[piece.start : piece.stop]

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, *purpose))
