"""Pairs out of a list: grouped by image and cut into chunks.

A list that can be read from any of its items on stays in its file: `StreamedList` keeps some bytes
an item, and every process reads the chunks that it converts. Another list is read once, into a
`Spool`, which takes the place of its file.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from operator import attrgetter
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from blip_scale.data.conversion.pairs import (
    START,
    Chunk,
    Found,
    Place,
    RawPair,
    ReadList,
    Source,
    Unused,
)
from blip_scale.data.conversion.repeats import repeats
from blip_scale.data.conversion.spool import Spool
from blip_scale.errors import RefusedInput

_SPACING = 16  # groups of consecutive pairs between two places that are kept
_AHEAD_BYTES = 1 << 18  # a list is read on, rather than opened again, up to a place so far ahead


class ChangedList(RefusedInput, OSError):
    """A list that was written while its conversion was running."""


def _no_note(pair: RawPair) -> None:
    """Ignore a pair."""


def listed(
    read: ReadList,
    is_streamed: bool,
    scratch: str = "",
    note: Callable[[RawPair], None] = _no_note,
) -> StreamedList:
    """The pairs of a list, grouped by image, and then its other items.

    Args:
        read: reads the list.
        is_streamed: whether it can be read from any place on; else it is read once.
        scratch: folder for the spool of such a list (see `Source`).
        note: called with the pairs, of which consecutive ones of an image may be left out.
    """
    if not is_streamed:
        read = Spool.of((item for _, item in read(START)), scratch)
    return StreamedList(read, note)


class StreamedList:
    """Result of `group_by_image` for a list, in 15 bytes a pair while the list is scanned.

    Consecutive pairs of the same id form a run. Most images have one run. The later runs of the
    others are known by number, and read with the first one. Runs are compared by a 64-bit hash of
    their id. Two ids with the same hash are kept apart when they are read.
    """

    def __init__(self, read: ReadList, note: Callable[[RawPair], None] = _no_note) -> None:
        """Scan a list; `note` is called with the first pair of every run."""
        self._read = read
        hashes = bytearray()
        places, others = array("q"), array("q")
        last_id = None
        for place, item in read(START):
            if not isinstance(item, RawPair):
                others.extend(place)
            elif item.id != last_id:
                if len(hashes) % (8 * _SPACING) == 0:
                    places.extend(place)
                hashes += xxhash.xxh3_64_digest(item.id.encode("utf-8", "surrogatepass"))
                last_id = item.id
                note(item)
        self._runs = len(hashes) // 8
        self._places = np.frombuffer(places, np.int64).reshape(-1, 3)
        """Places of every `_SPACING`-th run."""
        self._others = np.frombuffer(others, np.int64).reshape(-1, 3)
        """Places of the items that are no pairs."""
        self._later, firsts = repeats(np.frombuffer(hashes, np.uint64))
        """Numbers of the runs whose image has an earlier run, ascending."""
        order = np.argsort(firsts, kind="stable")
        self._firsts = firsts[order]
        """First runs of the images that have several, ascending, once for each later run."""
        self._of_firsts = self._later[order]
        """The later run of each entry of `_firsts`."""

    def __len__(self) -> int:
        return self._images + len(self._others)

    def __getitem__(self, part: slice) -> StreamedPart:
        start, stop, _ = part.indices(len(self))
        return StreamedPart(self, start, stop)

    def reader(self, start: int, stop: int) -> Callable[[], Iterator[Found]]:
        """A function that reads the items from `start` to `stop`, independent of this object."""
        runs = self._runs_of(min(start, self._images), min(stop, self._images))
        places = self._places[runs // _SPACING]
        is_far = (np.diff(places[:, 0]) != 0) | (np.diff(places[:, 1]) > _AHEAD_BYTES)
        jumps = np.append(True, is_far) if len(runs) else np.zeros(0, bool)
        starts = {}
        for run, place in zip(runs[jumps].tolist(), places[jumps].tolist(), strict=True):
            starts[run] = Place(*place)
        others = self._others[max(0, start - self._images) : max(0, stop - self._images)]
        return partial(_read_part, self._read, runs, starts, others)

    @property
    def _images(self) -> int:
        return self._runs - len(self._later)

    def _runs_of(self, start: int, stop: int) -> NDArray[np.int64]:
        """Numbers of the runs of some images, ascending."""
        if start >= stop:
            return np.zeros(0, np.int64)
        first, last = self._first_run(start), self._first_run(stop - 1)
        inside = self._later[bisect_left(self._later, first) : bisect_left(self._later, last)]
        begin, end = bisect_left(self._firsts, first), bisect_right(self._firsts, last)
        runs = np.setdiff1d(np.arange(first, last + 1), inside, assume_unique=True)
        return np.union1d(runs, self._of_firsts[begin:end])

    def _first_run(self, image: int) -> int:
        """Number of the first run of an image."""
        later = self._later
        before = bisect_right(range(len(later)), image, key=lambda i: int(later[i]) - i)
        return image + before


class StreamedPart:
    """Consecutive items of a `StreamedList`. Pickled, it is independent of the list."""

    def __init__(self, items: StreamedList, start: int, stop: int) -> None:
        self._items, self._start, self._stop = items, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __call__(self) -> Iterator[Found]:
        """Read the items."""
        return self._items.reader(self._start, self._stop)()

    def __reduce__(self) -> tuple[Any, ...]:
        return self._items.reader(self._start, self._stop).__reduce__()  # type: ignore[return-value]


def _read_part(
    read: ReadList, runs: NDArray[np.int64], starts: dict[int, Place], others: NDArray[np.int64]
) -> Iterator[Found]:
    """Read some runs, grouped by image, and some other items.

    Args:
        read: reads the list.
        runs: int64 [runs], ascending.
        starts: place of the last kept run up to a run, for runs before which much is passed over.
        others: int64 [others, 3], places.
    """
    yield from group_by_image(_pairs_of(read, runs, starts))
    last = Place(-1, 0, 0)
    for place in (Place(*fields) for fields in others.tolist()):
        if place.file != last.file or place.offset - last.offset > _AHEAD_BYTES:
            items = read(place)
        while last != place:
            last, item = _next(items)
        yield item


def _pairs_of(
    read: ReadList, runs: NDArray[np.int64], starts: dict[int, Place]
) -> Iterator[RawPair]:
    at = 0
    for run in runs.tolist():
        if run in starts:
            at = run // _SPACING * _SPACING
            groups = groupby(_pairs(read(starts[run])), attrgetter("id"))
        while at < run:
            _next(groups)
            at += 1
        yield from _next(groups)[1]
        at += 1


def _pairs(items: Iterable[tuple[Place, Found]]) -> Iterator[RawPair]:
    for _, item in items:
        if isinstance(item, RawPair):
            yield item


def _next(items: Iterator[Any]) -> Any:
    """The next item of a list that is as long as it was."""
    item = next(items, None)
    if item is None:
        raise ChangedList("a list has become shorter: convert again with --overwrite")
    return item


def in_chunks(items: list[Found] | StreamedList, size: int) -> Iterator[Chunk]:
    """Cut a list into chunks of `size` items."""
    return joint_chunks([items], size)


def joint_chunks(lists: Iterable[list[Found] | StreamedList], size: int) -> Iterator[Chunk]:
    """Cut lists, one after the other, into chunks of `size` items."""
    start = 0
    for parts in _cut(lists, size):
        count = sum(map(len, parts))
        yield Chunk(
            name=f"{start} to {start + count - 1}",
            read=partial(_chained, parts),
            fingerprint="",
            pairs=sum(map(_pair_count, parts)),
        )
        start += count


def spooled_chunks(items: Iterable[Found], source: Source) -> Iterator[Chunk]:
    """Chunks of items that are read once, now, and are not grouped by image."""
    return _spooled_chunks(Spool.of(items, source.scratch), source.pairs_per_chunk)


def _spooled_chunks(spool: Spool[Found], size: int) -> Iterator[Chunk]:
    placed = spool(START)
    start = 0
    while part := list(islice(placed, size)):
        yield Chunk(
            name=f"{start} to {start + len(part) - 1}",
            read=partial(_spooled, spool, part[0][0], len(part)),
            fingerprint="",
            pairs=sum(not isinstance(item, Unused) for _, item in part),
        )
        start += len(part)


def _spooled(spool: Spool[Found], start: Place, count: int) -> Iterator[Found]:
    return (item for _, item in islice(spool(start), count))


def _cut(
    lists: Iterable[list[Found] | StreamedList], size: int
) -> Iterator[list[list[Found] | StreamedPart]]:
    """Parts of lists that have `size` items together; the last ones may have fewer."""
    parts: list[list[Found] | StreamedPart] = []
    missing = size
    for items in lists:
        start = 0
        while start < len(items):
            part = items[start : start + missing]
            parts.append(part)
            start += len(part)
            missing -= len(part)
            if not missing:
                yield parts
                parts, missing = [], size
    if parts:
        yield parts


def _chained(parts: Sequence[list[Found] | StreamedPart]) -> Iterator[Found]:
    for part in parts:
        yield from part() if callable(part) else part


def _pair_count(part: list[Found] | StreamedPart) -> int:
    if isinstance(part, StreamedPart):
        return len(part)
    return sum(not isinstance(item, Unused) for item in part)


def group_by_image(items: Iterable[Found]) -> list[Found]:
    """Join pairs of the same id to one pair with all captions and annotations, in the order in
    which the ids first appear."""
    grouped: dict[str, RawPair | list[RawPair]] = {}
    """A list where an id comes more than once: most lists have an image once, and may be long."""
    others: list[Found] = []
    for item in items:
        if not isinstance(item, RawPair):
            others.append(item)
            continue
        before = grouped.setdefault(item.id, item)
        if isinstance(before, list):
            before.append(item)
        elif before is not item:
            grouped[item.id] = [before, item]
    pairs: list[Found] = []
    while grouped:  # emptied from its end, so that each pair is held once
        same = grouped.popitem()[1]
        pairs.append(_joined(same if isinstance(same, list) else [same]))
    pairs.reverse()
    return pairs + others


def _joined(pairs: list[RawPair]) -> RawPair:
    """The first of some pairs, with the captions and annotations of all in lists."""
    captions: list[Any] = []
    annotations: list[dict[str, Any]] = []
    for pair in pairs:
        captions += pair.captions if isinstance(pair.captions, list) else [pair.captions]
        annotations += pair.annotations or []
    return replace(pairs[0], captions=captions, annotations=annotations or None)
