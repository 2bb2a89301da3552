"""Which sample comes when: a pure function of the seed, the epoch and the position in it.

Ranks, workers and earlier reads do not change it, and nothing needs to be read to find out. So a
run resumes anywhere at once, and any number of ranks sees the same global order.

Shards are fetched whole and sets may be larger than memory, so shuffling has two stages. All shards
of all streams are shuffled and cut into blocks of about `block_samples`, then the samples of a
block are shuffled together. Smaller sets are one block, shuffled perfectly.

Memory grows with the shards (5 bytes each) and, in a process that lays a block out, with the block
(8 bytes a sample), not with the samples of an epoch. While an epoch is laid out, it takes some 50
bytes a shard more.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blip_scale.data.loading.block_layouts import BlockKey, BlockLayouts
from blip_scale.data.loading.seeds import generators
from blip_scale.data.reading.shared_arrays import SharedArray, return_freed_memory

_MANY_PIECES = 10_000  # of an epoch, whose layout takes megabytes for a moment
_WINDOW = 256
"""Positions that are looked up together: a few micro-batches, or a part of one."""
_PASS, _SHARD, _EPOCH, _BLOCK = range(4)  # keep the uses of the seed apart


@dataclass(frozen=True)
class StreamShape:
    """Properties of a stream that determine the order."""

    name: str
    shard_samples: Sequence[int] | NDArray[np.int64] | SharedArray
    """Samples of each shard: images, or captions where an epoch reads each of them once."""
    samples_per_epoch: int
    offset: int = 0
    """Place in the stream's row of passes at which epoch 0 begins, see `course.Part`."""


class Slot(NamedTuple):
    """A sample by its place: the number of its stream, shard and place in the shard."""

    stream: int
    shard: int
    sample: int
    passing: int
    """Number of complete passes over the stream before this one; decides which caption is due."""


class _Pass(NamedTuple):
    """The part of a pass over a stream that an epoch reads.

    It consists of pieces: each is a shard, or a range of the shard's own permutation.
    """

    stream: int
    passing: int
    ranges: dict[int, tuple[int, int]]
    """Range of the shard's permutation for shards that are not read as a whole: at most two."""


class SampleOrder:
    """The endless order of samples over the streams.

    A stream is an endless row of passes, each of them through all of its shards in an order of its
    own; every epoch takes the next `samples_per_epoch` of the row. So an epoch of as many samples
    as the stream has reads each of them once, twice as many twice, and half as many a different
    half in each of two epochs.

    A copy, in this process or pickled to another, begins anew, but shares the layouts of blocks.
    """

    def __init__(
        self,
        streams: Sequence[StreamShape],
        seed: int,
        block_samples: int,
        layouts: BlockLayouts | None = None,
    ):
        self.samples_per_epoch = sum(stream.samples_per_epoch for stream in streams)
        self._streams = tuple(streams)
        self._sizes = [np.asarray(stream.shard_samples) for stream in streams]
        self._seed = seed
        self._seed_words = _words(seed)
        self._block_samples = block_samples
        if layouts is None:
            largest = max((int(sizes.max(initial=0)) for sizes in self._sizes), default=0)
            layouts = BlockLayouts(block_samples + largest)
        self._layouts = layouts
        self._epoch = -1
        self._passes: list[_Pass] = []
        """Passes of the epoch."""
        self._pass_places = np.zeros((0, 2), np.int64)
        """Stream and number of each pass."""
        self._piece_passes: NDArray[Any] = np.zeros(0, np.uint8)
        """Number of the pass of each piece of the epoch, in the order of the epoch."""
        self._piece_shards = np.zeros(0, np.int32)
        """Shard of each piece."""
        self._block_firsts = np.zeros(1, np.int64)
        """Number of each block's first piece, and the number of pieces."""
        self._block_starts = np.zeros(1, np.int64)
        """First position of each block, and the end of the epoch."""
        self._block_range = range(0)
        self._block_slice = slice(0)
        """Numbers of the block's pieces."""
        self._block = 0
        """Number of the block in the epoch."""
        self._layout: NDArray[np.int32] | None = None
        """Layout of the block where this object made it, see `_lay_out`."""
        self._window = range(0)
        """Positions of the epoch that were looked up last."""
        self._window_slots: list[tuple[int, int, int, int]] = []
        """The fields of their slots."""

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleOrder, (self._streams, self._seed, self._block_samples, self._layouts)

    def locate(self, epoch: int, position: int) -> Slot:
        """The sample at `position` of `epoch`, 0 <= position < samples_per_epoch."""
        if epoch != self._epoch or position not in self._window:
            self._look_up(epoch, position)
        return Slot(*self._window_slots[position - self._window.start])

    def block_of(self, epoch: int, position: int) -> tuple[int, int]:
        """The block that holds a position, as its epoch and first position."""
        self._enter(epoch, position)
        return epoch, self._block_range.start

    def upcoming(
        self, epoch: int, position: int, by_use: bool = True
    ) -> Iterator[NDArray[np.int64]]:
        """Stream and shard of what is read from a position on, [shards, 2], block after block, for
        ever.

        With `by_use`, the first array holds what the rest of the block reads, by first use. The
        others hold all that a block reads, in no particular order, which takes less time. A shard
        that a block reads in several pieces is repeated.
        """
        while True:
            self._enter(epoch, position)
            pieces = self._used_pieces(position) if by_use else self._block_slice
            streams = self._pass_places[self._piece_passes[pieces], 0]
            shards = self._piece_shards[pieces]
            position = self._block_range.stop
            if position == self.samples_per_epoch:
                epoch, position = epoch + 1, 0
            by_use = False
            yield np.stack([streams, shards], axis=1)

    def _enter(self, epoch: int, position: int) -> None:
        """Find the epoch and the block of a position, unless it is in those of the last call."""
        if not 0 <= position < self.samples_per_epoch:
            raise IndexError(f"position {position} in an epoch of {self.samples_per_epoch} samples")
        if epoch != self._epoch:
            self._enter_epoch(epoch)
        if position not in self._block_range:
            self._enter_block(position)

    def _look_up(self, epoch: int, position: int) -> None:
        """Look up a window that begins at `position`."""
        self._enter(epoch, position)
        self._window = range(position, min(position + _WINDOW, self._block_range.stop))
        numbers, samples = self._laid_out(self._window).T
        pieces = self._block_slice.start + numbers
        streams, passings = self._pass_places[self._piece_passes[pieces]].T
        columns = (streams, self._piece_shards[pieces], samples, passings)
        self._window_slots = list(zip(*(column.tolist() for column in columns), strict=True))

    def _used_pieces(self, position: int) -> NDArray[np.int64]:
        """Numbers of the pieces that the rest of the block reads, by first use."""
        numbers = self._laid_out(range(position, self._block_range.stop))[:, 0]
        first_use = np.full(self._block_slice.stop - self._block_slice.start, len(numbers))
        # Of the places that an index is assigned, the last one stays: backwards, the first use.
        first_use[numbers[::-1]] = np.arange(len(numbers))[::-1]
        by_use = np.argsort(first_use, kind="stable")
        used = by_use[: np.count_nonzero(first_use < len(numbers))]
        return self._block_slice.start + used

    def _enter_epoch(self, epoch: int) -> None:
        read = []
        for number in range(len(self._streams)):
            read += self._stream_passes(number, epoch)
        self._passes = [part for part, _ in read]
        self._pass_places = np.array([(part.stream, part.passing) for part in self._passes])
        counts = [len(shards) for _, shards in read]
        order = self._rng(_EPOCH, epoch).permutation(sum(counts))
        kind = np.min_scalar_type(len(read))
        self._piece_passes = np.repeat(np.arange(len(read), dtype=kind), counts)[order]
        self._piece_shards = np.concatenate([shards for _, shards in read])[order]
        lengths = np.concatenate([self._lengths(*part) for part in read])[order]
        starts = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        # A block is made of the pieces that start in its span. It is empty in a longer piece.
        spans = np.arange(int(starts[-2]) // self._block_samples + 2) * self._block_samples
        self._block_firsts = np.searchsorted(starts[:-1], spans, side="left")
        self._block_starts = starts[self._block_firsts]
        self._block_range = self._window = range(0)
        self._epoch = epoch
        if len(lengths) >= _MANY_PIECES:
            del read, order, lengths, starts
            return_freed_memory()

    def _stream_passes(self, number: int, epoch: int) -> list[tuple[_Pass, NDArray[np.int32]]]:
        """The passes over a stream that an epoch reads from, and the shards that it reads."""
        stream, sizes = self._streams[number], self._sizes[number]
        samples = int(sizes.sum())
        begin = stream.offset + stream.samples_per_epoch * epoch
        end = begin + stream.samples_per_epoch
        passes = []
        for passing in range(begin // samples, -(-end // samples)):
            rng = self._rng(_PASS, zlib.crc32(stream.name.encode()), passing)
            shards = rng.permutation(len(sizes)).astype(np.int32)
            lengths = sizes[shards].astype(np.int64)
            offsets = passing * samples + np.cumsum(lengths) - lengths
            starts = np.maximum(begin - offsets, 0)
            stops = np.minimum(end - offsets, lengths)
            is_part = (starts < stops) & (stops - starts < lengths)
            ranges = {
                int(shards[part]): (int(starts[part]), int(stops[part]))
                for part in np.flatnonzero(is_part)
            }
            passes.append((_Pass(number, passing, ranges), shards[starts < stops]))
        return passes

    def _lengths(self, part: _Pass, shards: NDArray[np.int32]) -> NDArray[np.int64]:
        """Samples that a pass reads of each shard."""
        lengths = self._sizes[part.stream][shards].astype(np.int64)
        for shard, (start, stop) in part.ranges.items():
            lengths[shards == shard] = stop - start
        return lengths

    def _enter_block(self, position: int) -> None:
        """Find the block that holds `position`."""
        block = int(np.searchsorted(self._block_starts, position, side="right")) - 1
        start, stop = self._block_starts[block : block + 2].tolist()
        self._block, self._block_range = block, range(start, stop)
        self._block_slice = slice(*self._block_firsts[block : block + 2].tolist())
        self._layout = None

    def _laid_out(self, positions: range) -> NDArray[np.int32]:
        """Rows of the block's layout for some of its positions; see `_lay_out`."""
        start = self._block_range.start
        rows = range(positions.start - start, positions.stop - start)
        if self._layout is None:
            key = BlockKey(self._epoch, self._block, len(self._block_range))
            return self._layouts.get(key, rows, self._lay_out)
        return self._layout[rows.start : rows.stop]

    def _lay_out(self) -> NDArray[np.int32]:
        """Lay the block out, and keep it as long as the block is in use.

        Returns:
            Piece of the block and number in its shard for each position of the block, [samples, 2].
        """
        layout = np.empty((len(self._block_range), 2), np.int32)
        passes = self._piece_passes[self._block_slice].tolist()
        shards = self._piece_shards[self._block_slice].tolist()
        stop = 0
        for piece, rng in enumerate(self._shard_rngs()):
            part, shard = self._passes[passes[piece]], shards[piece]
            samples = rng.permutation(int(self._sizes[part.stream][shard]))
            if shard in part.ranges:
                samples = samples[slice(*part.ranges[shard])]
            start, stop = stop, stop + len(samples)
            layout[start:stop, 0] = piece
            layout[start:stop, 1] = samples
        # As whole rows, which takes less time than rows in the order of a permutation.
        self._rng(_BLOCK, self._epoch, self._block).shuffle(layout.view(np.int64)[:, 0])
        self._layout = layout
        return layout

    def _shard_rngs(self) -> list[np.random.Generator]:
        """The generator of each piece of the block, which shuffles its shard."""
        passes = self._piece_passes[self._block_slice]
        shards = self._piece_shards[self._block_slice].astype(np.uint32)
        rngs = np.empty(len(passes), object)
        for number in np.unique(passes):
            part = self._passes[number]
            name = zlib.crc32(self._streams[part.stream].name.encode())
            is_of_pass = passes == number
            of_pass = generators(self._seed_of(_SHARD, name, part.passing), shards[is_of_pass])
            rngs[is_of_pass] = list(of_pass)
        return rngs.tolist()

    def _rng(self, *purpose: int) -> np.random.Generator:
        # The same generator as from a tuple of the seed and the purpose, in half of the time.
        return np.random.default_rng(self._seed_of(*purpose))

    def _seed_of(self, *purpose: int) -> NDArray[np.uint32]:
        return np.array([*self._seed_words, *purpose], np.uint32)


def _words(seed: int) -> list[int]:
    """The 32-bit words of a seed, as NumPy takes it apart."""
    words = [seed & 0xFFFFFFFF]
    while seed := seed >> 32:
        words.append(seed & 0xFFFFFFFF)
    return words
