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
    grouped: dict[str, RawPair] = {}
    captions: dict[str, list[Any]] = {}
    annotations: dict[str, list[dict[str, Any]]] = {}
    others: list[Found] = []
    for item in items:
        if not isinstance(item, RawPair):
            others.append(item)
            continue
        grouped.setdefault(item.id, item)
        texts = item.captions if isinstance(item.captions, list) else [item.captions]
        captions.setdefault(item.id, []).extend(texts)
        annotations.setdefault(item.id, []).extend(item.annotations or [])
    whole = (
        replace(pair, captions=captions[pair.id], annotations=annotations[pair.id] or None)
        for pair in grouped.values()
    )
    return [*whole, *others]
