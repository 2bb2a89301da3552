"""On-disk format of overlays: additional captions for an existing set of shards.

An overlay is an MDS folder. It has one shard for each shard of images and one sample for each
image, in the same order. A reader therefore finds the captions of an image at the same shard and
index, without a table of ids. A sample has the columns of `COLUMNS`:

- `id`, the id of the image, which readers verify; may be "" if there is no caption;
- `captions`, a JSON list of uncleaned texts, which may be empty;
- `roles`, a JSON list with the role of each caption;
- `annotations`, a JSON list with an object for each caption, or an empty list.

index.json has `caption_roles`, like that of images, and `overlay`: the version of this format and
the SHA-256 of the index of the images. An overlay of other images is refused. `overlay.json`
describes how the overlay was made and counts the joined captions.
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
    """Writes the shards of an overlay, and its index at the end."""

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
        """Number of captions written, by role."""

    @property
    def names(self) -> list[str]:
        """File names of the shards written."""
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
        """End the current shard. Call this at the end of each shard of images.

        Raises:
            ValueError: the captions are too large for one shard.
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
        description: value of `OVERLAY_KEY` in the index of the overlay.
        samples: number of samples of each shard of the overlay.
        images_sha256: SHA-256 of the index of the images.
        image_samples: number of samples of each shard of images.

    Raises:
        ValueError: the overlay was made for other images, or has an unknown version.
    """
    if not isinstance(description, dict):
        raise ValueError("it is not an overlay: make one with `blip-scale overlay`")
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
        raise ValueError(
            "its shards have other numbers of samples than the shards of images: make it again"
        )


def add_captions(sample: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add the captions of an overlay's sample to the sample of an image.

    Raises:
        ValueError: the captions are damaged, or belong to another image.
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
