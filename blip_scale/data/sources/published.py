"""Column names of sets that are published as lists of URLs, for readers and filters.

To add a set, add an entry to `SETS`. The set then becomes a SOURCE of `prepare-data`. Its captions
and similarities are recognised, and the error about a list without images names the set.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedSet:
    """Columns of a published list, with the authors' names. img2dataset keeps these names."""

    title: str
    captions: tuple[str, ...]
    """Columns with captions. The first is the one to train on."""
    url: str
    uid: str = ""
    """Column with an id that other publications refer to."""
    similarity: tuple[str, ...] = ()
    """Columns with similarities of image and text. The first is the one to filter by."""
    punsafe: str = ""
    """Column with the probability that the image is unsafe."""
    pwatermark: tuple[str, ...] = ()
    """Column with the probability of a watermark, or columns from which it is computed."""
    sha256: str = ""
    """Column with the hash of the image at the time of publication."""

    def download_options(self) -> str:
        """Return img2dataset's options to download the images and keep captions, ids and scores."""
        kept = [*self.captions[1:], self.uid, *self.similarity, self.punsafe, *self.pwatermark]
        # img2dataset always writes its own columns `key` and `sha256`.
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
"""SOURCE of `prepare-data` -> columns of the set. LAION-400M has the same column names as Re-LAION,
but no probabilities."""


def recognised(columns: Collection[str]) -> PublishedSet | None:
    """Return the set whose required columns are all present, or None.

    If there are several, return the set with the most required columns.
    """
    best: PublishedSet | None = None
    most = 0
    for candidate in SETS.values():
        needed = {candidate.url, *candidate.captions[:2], candidate.uid} - {""}
        if needed <= set(columns) and len(needed) > most:
            best, most = candidate, len(needed)
    return best
