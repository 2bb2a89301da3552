"""Which sample comes when: a pure function of the seed, the epoch and the position in it.

Nobody else has a say in it, neither ranks nor workers nor what was read before, and nothing needs
to be read to find out: a run resumes anywhere at once, and any number of ranks sees the same global
order.

Shuffling is in two stages, as shards are fetched whole and sets may be larger than memory: all
shards of all streams are shuffled and cut into blocks of about `block_samples`, then the samples of
a block are shuffled together. Smaller sets are one block, shuffled perfectly.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_PASS, _SHARD, _EPOCH, _BLOCK = range(4)  # keep the uses of the seed apart


@dataclass(frozen=True)
class StreamShape:
    """What the order needs to know of a stream. Its samples are images, or captions where each of
    them is to be read once an epoch."""

    name: str
    shard_samples: tuple[int, ...]
    samples_per_epoch: int

    @property
    def samples(self) -> int:
        return sum(self.shard_samples)


@dataclass(frozen=True)
class Slot:
    """A sample by its place: the number of its stream, shard and place in the shard."""

    stream: int
    shard: int
    sample: int
    passing: int
    """So many times the stream has been read whole before: which of its captions is due."""


@dataclass(frozen=True)
class _Piece:
    """The part of a shard that an epoch reads: a range of the shard's own permutation."""

    stream: int
    shard: int
    passing: int
    start: int
    stop: int


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
        self._seed = seed
        self._block_samples = block_samples
        self._epoch = -1
        self._pieces: list[_Piece] = []
        self._starts: NDArray[np.int64] = np.zeros(1, np.int64)
        self._block_range = range(0)
        self._block: NDArray[np.int32] = np.zeros((0, 2), np.int32)

    def locate(self, epoch: int, position: int) -> Slot:
        """The sample at `position` of `epoch`, 0 <= position < samples_per_epoch."""
        if not 0 <= position < self.samples_per_epoch:
            raise IndexError(f"position {position} in an epoch of {self.samples_per_epoch} samples")
        if epoch != self._epoch:
            self._enter_epoch(epoch)
        if position not in self._block_range:
            self._enter_block(position)
        number, sample = self._block[position - self._block_range.start]
        piece = self._pieces[number]
        return Slot(piece.stream, piece.shard, int(sample), piece.passing)

    def block_of(self, epoch: int, position: int) -> tuple[int, int]:
        """The block that holds a position, as its epoch and first position."""
        self.locate(epoch, position)
        return epoch, self._block_range.start

    def upcoming(self, epoch: int, position: int) -> Iterator[list[tuple[int, int]]]:
        """Stream and shard of what is read from a position on, by first use: first of the rest of
        its block, then of each later block, for ever.
        """
        while True:
            self.locate(epoch, position)
            numbers = self._block[position - self._block_range.start :, 0]
            pieces, first_uses = np.unique(numbers, return_index=True)
            used = [self._pieces[number] for number in pieces[np.argsort(first_uses)]]
            shards = list(dict.fromkeys((piece.stream, piece.shard) for piece in used))
            position = self._block_range.stop
            if position == self.samples_per_epoch:
                epoch, position = epoch + 1, 0
            yield shards

    def _enter_epoch(self, epoch: int) -> None:
        pieces = [
            piece
            for number, stream in enumerate(self._streams)
            for piece in self._stream_pieces(number, stream, epoch)
        ]
        shuffled = self._rng(_EPOCH, epoch).permutation(len(pieces))
        self._pieces = [pieces[i] for i in shuffled]
        lengths = [piece.stop - piece.start for piece in self._pieces]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._block_range = range(0)
        self._epoch = epoch

    def _stream_pieces(self, number: int, stream: StreamShape, epoch: int) -> list[_Piece]:
        begin, end = (stream.samples_per_epoch * e for e in (epoch, epoch + 1))
        pieces = []
        for passing in range(begin // stream.samples, -(-end // stream.samples)):
            offset = passing * stream.samples
            rng = self._rng(_PASS, zlib.crc32(stream.name.encode()), passing)
            for shard in rng.permutation(len(stream.shard_samples)):
                length = stream.shard_samples[shard]
                start, stop = max(begin - offset, 0), min(end - offset, length)
                if start < stop:
                    pieces.append(_Piece(number, int(shard), passing, start, stop))
                offset += length
        return pieces

    def _enter_block(self, position: int) -> None:
        """Lay out the block that holds `position`: the pieces that start in its span."""
        piece = int(np.searchsorted(self._starts, position, side="right")) - 1
        block = int(self._starts[piece]) // self._block_samples
        span = np.array([block, block + 1]) * self._block_samples
        first, last = np.searchsorted(self._starts[:-1], span, side="left")
        rows = [
            np.stack([np.full(piece.stop - piece.start, number), self._samples_of(piece)], axis=1)
            for number, piece in enumerate(self._pieces[first:last], start=int(first))
        ]
        block_rows = np.concatenate(rows).astype(np.int32)
        self._block = self._rng(_BLOCK, self._epoch, block).permutation(block_rows)
        self._block_range = range(int(self._starts[first]), int(self._starts[last]))

    def _samples_of(self, piece: _Piece) -> NDArray[np.int64]:
        stream = self._streams[piece.stream]
        name = zlib.crc32(stream.name.encode())
        order = self._rng(_SHARD, name, piece.passing, piece.shard).permutation(
            stream.shard_samples[piece.shard]
        )
        return order[piece.start : piece.stop]

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, *purpose))
