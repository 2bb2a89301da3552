"""Pairs out of a list: grouped by image and cut into chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from blip_scale.data.conversion.pairs import Chunk, Found, RawPair, Unused


def in_chunks(items: list[Found], size: int) -> Iterator[Chunk]:
    """Cut a list into chunks of `size` items."""
    for start in range(0, len(items), size):
        part = items[start : start + size]
        yield Chunk(
            name=f"{start} to {start + len(part) - 1}",
            read=partial(iter, part),
            fingerprint="",
            pairs=sum(not isinstance(item, Unused) for item in part),
            listed=part,
        )


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
