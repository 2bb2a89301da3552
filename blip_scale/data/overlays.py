"""The on-disk form of overlays: more captions for a set of shards, beside it.

An overlay is an MDS folder with a shard for each shard of images, and a sample for each of their
samples, in the same order. So a reader finds the captions of an image at the same place, and needs
no table of ids. A sample has the columns of `COLUMNS`:

- `id`, that of the image, which a reader compares; "" may stand where there is no caption;
- `captions`, a JSON list of texts with their punctuation, empty where there is none;
- `roles`, a JSON list with the role of each caption;
- `annotations`, a JSON list with an object for each caption, or an empty list.

index.json has `caption_roles`, as that of images, and `overlay`: the version of this form and the
SHA-256 of the index of the images. An overlay of other images is refused. `overlay.json` says how
the overlay was made, and counts what was joined.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip_scale.data import mds
from blip_scale.data.mds import INDEX_NAME
from blip_scale.data.shards import HASH, ROLES_KEY, roles_of

COLUMNS = {"id": "str", "captions": "json", "roles": "json", "annotations": "json"}
OVERLAY_KEY = "overlay"
MANIFEST_NAME = "overlay.json"
VERSION = 1


class OverlayWriter:
    """Writes the shards of an overlay to a folder, and its index at the end."""

    def __init__(self, folder: Path, images_sha256: str) -> None:
        """Create the folder.

        Args:
            folder: folder to create.
            images_sha256: SHA-256 of the index of the images.
        """
        self._folder = folder
        self._images_sha256 = images_sha256
        self._writer = mds.Writer(folder, COLUMNS, mds.OFFSET_LIMIT - 1, hashes=(HASH,))
        self._ended = 0
        self.roles: Counter[str] = Counter()
        """Captions that were written, by role."""

    @property
    def names(self) -> list[str]:
        """File names of the shards so far."""
        return [shard["raw_data"]["basename"] for shard in self._writer.shards]

    def write(
        self,
        name: str,
        captions: Sequence[str],
        roles: Sequence[str],
        annotations: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Append the captions of the next image, whose id is `name`."""
        self.roles.update(roles)
        sample = {"captions": [*captions], "roles": [*roles], "annotations": [*annotations]}
        self._writer.write({"id": name, **sample})

    def end_shard(self) -> None:
        """End the shard, as that of the images ends.

        Raises:
            ValueError: its captions are too large for a shard.
        """
        self._writer.end_shard()
        self._ended += 1
        if len(self._writer.shards) != self._ended:
            raise ValueError(
                f"the captions of image shard {self._ended - 1} need more than 4 GiB: make the "
                "image shards smaller"
            )

    def finish(self) -> None:
        """Write the index."""
        self._writer.finish()
        index = json.loads((self._folder / INDEX_NAME).read_text())
        index[ROLES_KEY] = dict(sorted(self.roles.items()))
        index[OVERLAY_KEY] = {"version": VERSION, "images_sha256": self._images_sha256}
        (self._folder / INDEX_NAME).write_text(json.dumps(index, sort_keys=True))


def check_overlay(
    description: Any,
    samples: NDArray[np.int64],
    images_sha256: str,
    image_samples: NDArray[np.int64],
) -> None:
    """Check that an overlay belongs to a set of images.

    Args:
        description: `OVERLAY_KEY` of its index.
        samples: samples of each of its shards.
        images_sha256: SHA-256 of the index of the images.
        image_samples: samples of each shard of images.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(description, dict):
        raise ValueError(" it is not an overlay: make one with `blip-scale overlay`")
    if description.get("version") != VERSION:
        raise ValueError(
            f"its version is {description.get('version')!r}, this release reads {VERSION}: make "
            "the overlay again"
        )
    if description.get("images_sha256") != images_sha256:
        raise ValueError(
            "it was made for other images, or their index.json has changed since: make the "
            "overlay again"
        )
    if not np.array_equal(samples, image_samples):
        raise ValueError("its shards do not have the samples of the images': make it again")


def add_captions(sample: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add the captions of an overlay's sample to the sample of an image.

    Raises:
        ValueError: they are damaged, or those of another image.
    """
    if more["captions"] and more["id"] != sample["id"]:
        raise ValueError(f"the overlay has captions of {more['id']!r} at the place of this image")
    roles = roles_of(more)
    annotations = more["annotations"] or [{}] * len(roles)
    if not isinstance(annotations, list) or len(annotations) != len(roles):
        raise ValueError("the overlay does not have an annotation for each caption")
    sample["roles"] = roles_of(sample) + roles
    sample["captions"] = [*sample["captions"], *more["captions"]]
    if "annotations" in sample:
        sample["annotations"] = [*sample["annotations"], *annotations]
