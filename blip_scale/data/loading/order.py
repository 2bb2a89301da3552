"""Order of the samples: a pure function of the seed, the epoch and the position in the epoch.

The order does not depend on the number of ranks or workers, and computing it reads no data. A run
therefore resumes at any position at once, with any number of ranks.

Shards are fetched whole and sets may be larger than memory, so shuffling has two stages. First, the
shards of all streams are shuffled together and cut into blocks of about `block_samples` samples.
Then the samples within each block are shuffled. A set that fits into one block is shuffled fully.

Memory is 5 bytes per shard, and 8 bytes per sample of a block in the process that computes its
layout. It does not grow with the samples of an epoch. Computing an epoch's layout temporarily takes
about 50 bytes more per shard.
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

_MANY_PIECES = 10_000  # per epoch; its layout takes temporary megabytes
_WINDOW = 256
"""Number of positions looked up at once: a few micro-batches, or part of one."""
_PASS, _SHARD, _EPOCH, _BLOCK = range(4)  # separate random streams


@dataclass(frozen=True)
class StreamShape:
    """Sizes of a stream that determine the order."""

    name: str
    shard_samples: Sequence[int] | NDArray[np.int64] | SharedArray
    """Samples per shard; captions if `repeat` is `captions`."""
    samples_per_epoch: int
    offset: int = 0
    """Position in the stream at which epoch 0 begins, see `course.Part`."""


class Slot(NamedTuple):
    """Location of a sample: index of its stream, of its shard, and of the sample in the shard."""

    stream: int
    shard: int
    sample: int
    passing: int
    """Number of complete passes over the stream before this one; selects the caption."""


class _Pass(NamedTuple):
    """Part of one pass over a stream that an epoch reads.

    It consists of pieces. A piece is a whole shard, or a range of the shard's permutation.
    """

    stream: int
    passing: int
    ranges: dict[int, tuple[int, int]]
    """Shard -> range of its permutation, for shards that are read in part (at most two)."""


class SampleOrder:
    """Endless order of the samples of all streams.

    A stream is read in passes. Each pass reads all shards in its own random order. An epoch
    continues where the previous one stopped and takes the next `samples_per_epoch` samples. If
    that equals the size of the stream, an epoch reads each sample once; with twice the size, twice;
    with half the size, two epochs read different halves.

    A copy, also a pickled one, has its own position but shares the layouts of blocks.
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
        """Passes that the epoch reads from."""
        self._pass_places = np.zeros((0, 2), np.int64)
        """Stream and pass number of each element of `_passes`, [passes, 2]."""
        self._piece_passes: NDArray[Any] = np.zeros(0, np.uint8)
        """Index into `_passes` of each piece, in the order of the epoch."""
        self._piece_shards = np.zeros(0, np.int32)
        """Index of the shard of each piece."""
        self._block_firsts = np.zeros(1, np.int64)
        """Index of each block's first piece, followed by the number of pieces."""
        self._block_starts = np.zeros(1, np.int64)
        """First position of each block, followed by the end of the epoch."""
        self._block_range = range(0)
        self._block_slice = slice(0)
        """Indices of the current block's pieces."""
        self._block = 0
        """Index of the current block in the epoch."""
        self._layout: NDArray[np.int32] | None = None
        """Layout of the current block if this object computed it, see `_compute_layout`."""
        self._window = range(0)
        """Positions whose slots are in `_window_slots`."""
        self._window_slots: list[tuple[int, int, int, int]] = []
        """Fields of the slots in `_window`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleOrder, (self._streams, self._seed, self._block_samples, self._layouts)

    def locate(self, epoch: int, position: int) -> Slot:
        """Locate the sample at `position` of `epoch`, 0 <= position < samples_per_epoch."""
        if epoch != self._epoch or position not in self._window:
            self._look_up(epoch, position)
        return Slot(*self._window_slots[position - self._window.start])

    def block_of(self, epoch: int, position: int) -> tuple[int, int]:
        """Identify the block that holds a position, by its epoch and first position."""
        self._enter(epoch, position)
        return epoch, self._block_range.start

    def upcoming(
        self, epoch: int, position: int, by_use: bool = True
    ) -> Iterator[NDArray[np.int64]]:
        """Yield the shards that will be read from a position on, one array per block, endlessly.

        With `by_use`, the first array holds only the shards of the rest of the block, in order of
        first use. The other arrays hold all shards of a block in no particular order, which is
        faster. A shard occurs once for each of its pieces in the block.

        Yields:
            stream and shard of each piece, int64 [pieces, 2].
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
        """Set the current epoch and block to those of a position."""
        if not 0 <= position < self.samples_per_epoch:
            raise IndexError(f"position {position} in an epoch of {self.samples_per_epoch} samples")
        if epoch != self._epoch:
            self._enter_epoch(epoch)
        if position not in self._block_range:
            self._enter_block(position)

    def _look_up(self, epoch: int, position: int) -> None:
        """Fill `_window` with the slots from `position` on."""
        self._enter(epoch, position)
        self._window = range(position, min(position + _WINDOW, self._block_range.stop))
        numbers, samples = self._laid_out(self._window).T
        pieces = self._block_slice.start + numbers
        streams, passings = self._pass_places[self._piece_passes[pieces]].T
        columns = (streams, self._piece_shards[pieces], samples, passings)
        self._window_slots = list(zip(*(column.tolist() for column in columns), strict=True))

    def _used_pieces(self, position: int) -> NDArray[np.int64]:
        """Indices of the pieces that the rest of the block reads, in order of first use."""
        numbers = self._laid_out(range(position, self._block_range.stop))[:, 0]
        first_use = np.full(self._block_slice.stop - self._block_slice.start, len(numbers))
        # NumPy keeps the last value assigned to an index. Reversed, that is the first use.
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
        # A block holds the pieces that start in its span of `block_samples` positions. It is empty
        # if one piece covers the whole span.
        spans = np.arange(int(starts[-2]) // self._block_samples + 2) * self._block_samples
        self._block_firsts = np.searchsorted(starts[:-1], spans, side="left")
        self._block_starts = starts[self._block_firsts]
        self._block_range = self._window = range(0)
        self._epoch = epoch
        if len(lengths) >= _MANY_PIECES:
            del read, order, lengths, starts
            return_freed_memory()

    def _stream_passes(self, number: int, epoch: int) -> list[tuple[_Pass, NDArray[np.int32]]]:
        """Passes over a stream that an epoch reads from, each with the shards that are read."""
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
        """Number of samples that the epoch reads from each shard of a pass."""
        lengths = self._sizes[part.stream][shards].astype(np.int64)
        for shard, (start, stop) in part.ranges.items():
            lengths[shards == shard] = stop - start
        return lengths

    def _enter_block(self, position: int) -> None:
        """Make the block that holds `position` the current one."""
        block = int(np.searchsorted(self._block_starts, position, side="right")) - 1
        start, stop = self._block_starts[block : block + 2].tolist()
        self._block, self._block_range = block, range(start, stop)
        self._block_slice = slice(*self._block_firsts[block : block + 2].tolist())
        self._layout = None

    def _laid_out(self, positions: range) -> NDArray[np.int32]:
        """Rows of the block's layout for a range of its positions; see `_compute_layout`."""
        start = self._block_range.start
        rows = range(positions.start - start, positions.stop - start)
        if self._layout is None:
            key = BlockKey(self._epoch, self._block, len(self._block_range))
            return self._layouts.get(key, rows, self._compute_layout)
        return self._layout[rows.start : rows.stop]

    def _compute_layout(self) -> NDArray[np.int32]:
        """Compute the layout of the current block, and keep it while the block is current.

        Returns:
            index of the piece in the block and of the sample in its shard, for each position of
            the block, int32 [samples, 2].
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
        # Shuffle rows as 64-bit integers, which is faster than indexing with a permutation.
        self._rng(_BLOCK, self._epoch, self._block).shuffle(layout.view(np.int64)[:, 0])
        self._layout = layout
        return layout

    def _shard_rngs(self) -> list[np.random.Generator]:
        """Random generator for the shard of each piece of the block."""
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
        # Equal to default_rng((seed, *purpose)), in half of the time.
        return np.random.default_rng(self._seed_of(*purpose))

    def _seed_of(self, *purpose: int) -> NDArray[np.uint32]:
        return np.array([*self._seed_words, *purpose], np.uint32)


def _words(seed: int) -> list[int]:
    """Split a seed into 32-bit words, like NumPy does."""
    words = [seed & 0xFFFFFFFF]
    while seed := seed >> 32:
        words.append(seed & 0xFFFFFFFF)
    return words
