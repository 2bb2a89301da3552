"""Group the pairs of a list by image and cut them into chunks.

If reading can start at any item, the list stays in its file. `StreamedList` then keeps a few bytes
per item, and each process reads the chunks that it converts. Any other list is read once and
copied to a `Spool`, which supports reading from any item.
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

_SPACING = 16  # the place of every 16th run of pairs is kept
_AHEAD_BYTES = 1 << 18  # skip up to this many bytes by reading; beyond that, reopen the list


class ChangedList(RefusedInput, OSError):
    """The list was modified while its conversion was running."""


def _no_note(pair: RawPair) -> None:
    """Ignore a pair."""


def listed(
    read: ReadList,
    is_streamed: bool,
    scratch: str = "",
    note: Callable[[RawPair], None] = _no_note,
) -> StreamedList:
    """Return the pairs of a list, grouped by image, followed by its other items.

    Args:
        read: reads the list.
        is_streamed: whether reading can start at any place. If not, the list is read once.
        scratch: folder for the spool of a list that is not streamed (see `Source`).
        note: called with the pairs. Of consecutive pairs with the same image, it may get only the
            first.
    """
    if not is_streamed:
        read = Spool.of((item for _, item in read(START)), scratch)
    return StreamedList(read, note)


class StreamedList:
    """Lazy `group_by_image` of a list. Scanning the list needs 15 bytes per pair.

    Consecutive pairs with the same id form a run. Most images have one run. If an image has more,
    the numbers of its later runs are stored, and these are read together with the first. Runs are
    compared by a 64-bit hash of their id. Two ids with the same hash are separated when read.
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
        """Place of every `_SPACING`-th run."""
        self._others = np.frombuffer(others, np.int64).reshape(-1, 3)
        """Places of the items that are not pairs."""
        self._later, firsts = repeats(np.frombuffer(hashes, np.uint64))
        """Numbers of the runs whose image has an earlier run, ascending."""
        order = np.argsort(firsts, kind="stable")
        self._firsts = firsts[order]
        """First run of the image of each later run, ascending. Repeated once per later run."""
        self._of_firsts = self._later[order]
        """Later run that belongs to each entry of `_firsts`."""

    def __len__(self) -> int:
        return self._images + len(self._others)

    def __getitem__(self, part: slice) -> StreamedPart:
        start, stop, _ = part.indices(len(self))
        return StreamedPart(self, start, stop)

    def reader(self, start: int, stop: int) -> Callable[[], Iterator[Found]]:
        """Return a function that reads items `start` to `stop` without using this object."""
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
        """Return the numbers of the runs of images `start` to `stop`, ascending."""
        if start >= stop:
            return np.zeros(0, np.int64)
        first, last = self._first_run(start), self._first_run(stop - 1)
        inside = self._later[bisect_left(self._later, first) : bisect_left(self._later, last)]
        begin, end = bisect_left(self._firsts, first), bisect_right(self._firsts, last)
        runs = np.setdiff1d(np.arange(first, last + 1), inside, assume_unique=True)
        return np.union1d(runs, self._of_firsts[begin:end])

    def _first_run(self, image: int) -> int:
        """Return the number of an image's first run."""
        later = self._later
        before = bisect_right(range(len(later)), image, key=lambda i: int(later[i]) - i)
        return image + before


class StreamedPart:
    """Consecutive items of a `StreamedList`. A pickled part does not include the list."""

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
    """Read the given runs, grouped by image, then the other items.

    Args:
        read: reads the list.
        runs: int64 [runs], ascending run numbers.
        starts: run number -> place of the last run at or before it whose place is kept. Holds the
            runs at which the list is reopened.
        others: int64 [others, 3], places of items that are not pairs.
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
    """Return the next item. Raise `ChangedList` if the list has become shorter."""
    item = next(items, None)
    if item is None:
        raise ChangedList("a list has become shorter: convert again with --overwrite")
    return item


def in_chunks(items: list[Found] | StreamedList, size: int) -> Iterator[Chunk]:
    """Cut a list into chunks of `size` items."""
    return joint_chunks([items], size)


def joint_chunks(lists: Iterable[list[Found] | StreamedList], size: int) -> Iterator[Chunk]:
    """Concatenate lists and cut them into chunks of `size` items."""
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
    """Read all items at once into a spool, and cut them into chunks without grouping by image."""
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
    """Yield groups of list parts with `size` items in total. The last group may have fewer."""
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
    """Merge pairs with the same id into one pair with all captions and annotations.

    The result has the order in which the ids first appear, followed by items that are not pairs.
    """
    grouped: dict[str, RawPair | list[RawPair]] = {}
    """Values are lists only for repeated ids. Most lists have each image once and may be long."""
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
    while grouped:  # emptied from the end, so no pair is held twice
        same = grouped.popitem()[1]
        pairs.append(_joined(same if isinstance(same, list) else [same]))
    pairs.reverse()
    return pairs + others


def _joined(pairs: list[RawPair]) -> RawPair:
    """Return the first pair with the captions and annotations of all pairs."""
    captions: list[Any] = []
    annotations: list[dict[str, Any]] = []
    for pair in pairs:
        captions += pair.captions if isinstance(pair.captions, list) else [pair.captions]
        annotations += pair.annotations or []
    return replace(pairs[0], captions=captions, annotations=annotations or None)
