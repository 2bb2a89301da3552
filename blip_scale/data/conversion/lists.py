"""Pairs that a source lists one by one: gathered by image and cut into chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from blip_scale.data.conversion.pairs import Chunk, Found, RawPair, Unused


def in_chunks(found: list[Found], size: int) -> Iterator[Chunk]:
    """Cut a list into chunks of `size`."""
    for start in range(0, len(found), size):
        part = found[start : start + size]
        yield Chunk(
            name=f"{start} to {start + len(part) - 1}",
            read=partial(iter, part),
            fingerprint="",
            pairs=sum(not isinstance(item, Unused) for item in part),
            listed=part,
        )


def group_by_image(found: Iterable[Found]) -> list[Found]:
    """Pairs of the same id become one with all their captions and annotations, in the order of
    first sight."""
    grouped: dict[str, RawPair] = {}
    captions: dict[str, list[Any]] = {}
    annotations: dict[str, list[dict[str, Any]]] = {}
    others: list[Found] = []
    for one in found:
        if not isinstance(one, RawPair):
            others.append(one)
            continue
        grouped.setdefault(one.id, one)
        texts = one.captions if isinstance(one.captions, list) else [one.captions]
        captions.setdefault(one.id, []).extend(texts)
        annotations.setdefault(one.id, []).extend(one.annotations or [])
    whole = (
        replace(pair, captions=captions[pair.id], annotations=annotations[pair.id] or None)
        for pair in grouped.values()
    )
    return [*whole, *others]
