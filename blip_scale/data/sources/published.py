"""Column names of the sets that are published as lists of URLs, for readers and filters.

An entry in `SETS` is all that a new set needs: it becomes a SOURCE of `prepare-data`, its captions
and similarities are recognised, and the message about a list without images names it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedSet:
    """Columns of a published list, as its maker names them. img2dataset keeps the names."""

    title: str
    captions: tuple[str, ...]
    """Columns with captions, the one to train on first."""
    url: str
    uid: str = ""
    """Column with an id that other publications refer to."""
    similarity: tuple[str, ...] = ()
    """Columns with similarities of image and text, the one to filter by first."""
    punsafe: str = ""
    """Column with the probability that the image is unsafe."""
    pwatermark: tuple[str, ...] = ()
    """Column with the probability of a watermark, or columns that it follows from."""
    sha256: str = ""
    """Column with the hash of the image that the maker saw."""

    def download_options(self) -> str:
        """Options of img2dataset that fetch the images and keep captions, ids and scores."""
        kept = [*self.captions[1:], self.uid, *self.similarity, self.punsafe, *self.pwatermark]
        # img2dataset writes columns `key` and `sha256` by itself.
        columns = json.dumps([name for name in kept if name and name != "key"])
        return (
            f"--url_col {self.url} --caption_col {self.captions[0]} "
            f"--save_additional_columns '{columns}'"
        )


_LAION = {
    "url": "URL", "uid": "hash", "similarity": ("similarity",),
    "punsafe": "punsafe", "pwatermark": ("pwatermark",),
}  # fmt: skip

SETS: dict[str, PublishedSet] = {
    "datacomp": PublishedSet(
        "DataComp or CommonPool", ("text",), "url", "uid",
        ("clip_l14_similarity_score", "clip_b32_similarity_score"), sha256="sha256",
    ),
    "recap_datacomp": PublishedSet(
        "Recap-DataComp-1B",
        ("re_caption", "org_caption"), "url", "key",
        ("re_clip_score", "org_clip_score"), sha256="sha256",
    ),
    "pixelprose": PublishedSet(
        "PixelProse", ("vlm_caption", "original_caption"), "url", "uid",
        pwatermark=("watermark_class_id", "watermark_class_score"), sha256="sha256",
    ),
    "capsfusion": PublishedSet(
        "CapsFusion-120M", ("capsfusion", "laion_2b", "laion_coco"), "image_url"
    ),
    "relaion": PublishedSet("Re-LAION", ("TEXT",), **_LAION),  # type: ignore[arg-type]
    "laion_coco": PublishedSet(
        "LAION-COCO", ("top_caption", "all_captions", "TEXT"), **_LAION  # type: ignore[arg-type]
    ),
}  # fmt: skip
"""SOURCE of `prepare-data` -> columns of the set. LAION-400M has the names of Re-LAION, without its
probabilities."""


def recognised(columns: Collection[str]) -> PublishedSet | None:
    """The set that a list with these columns is of: the one of which most columns are there."""
    best: PublishedSet | None = None
    most = 0
    for candidate in SETS.values():
        needed = {candidate.url, *candidate.captions[:2], candidate.uid} - {""}
        if needed <= set(columns) and len(needed) > most:
            best, most = candidate, len(needed)
    return best
