"""Evaluation on the images that an annotation file lists, without making shards of them first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from blip_scale.data.captions import clean_caption
from blip_scale.data.conversion.pairs import Found, RawPair, Reject
from blip_scale.data.heldout.pairs import HeldoutPairs, Sample
from blip_scale.storage.locations import (
    is_local,
    is_web,
    list_folder,
    local_path,
    parent,
    read_file,
)
from blip_scale.storage.untrusted import RefusedPath, below


def listed_pairs(
    name: str,
    found: Iterable[Found],
    image_size: int,
    clean: Callable[[str], str] = clean_caption,
    images_below: str | None = None,
) -> HeldoutPairs:
    """What a reader found as a held-out set; images stay in their files, nothing is screened.

    Images that the list names must lie below the folder `images_below`; None: anywhere.

    Raises:
        ValueError: an item that can't be read, or no item at all.
        FileNotFoundError: images that aren't there; says how many and names the first.
    """
    listed = list(found)
    pairs = [one for one in listed if isinstance(one, RawPair)]
    broken = [f"{one.id}: {one.reason}" for one in listed if isinstance(one, Reject)]
    if broken or not pairs:
        first = f", the first: {broken[0]}" if broken else ""
        raise ValueError(f"{name}: {len(broken)} of {len(listed)} items can't be used{first}")
    if images_below is not None:
        for pair in pairs:
            _check_place(name, pair, images_below)
    files = [image for pair in pairs for image in (pair.image, pair.second_image)]
    absent = _absent([file for file in files if isinstance(file, str)])
    if absent:
        raise FileNotFoundError(
            f"{name}: {len(absent)} images aren't there, the first: {absent[0]}; give the folder "
            "that they lie in (--images), and what is to be cut off their paths (--strip-prefix)"
        )

    def encoded(index: int) -> Sample:
        images = {"image": pairs[index].image, "second_image": pairs[index].second_image}
        return {
            column: read_file(place) if isinstance(place, str) else place
            for column, place in images.items()
            if place is not None
        }

    return HeldoutPairs(name, (_texts(name, pair) for pair in pairs), encoded, image_size, clean)


def _absent(places: list[str]) -> list[str]:
    """Those that aren't there. Folders of object storage are listed once each; web servers are
    asked when an image is read."""
    listed: dict[str, set[str]] = {}
    for folder in {parent(place) for place in places if not is_local(place) and not is_web(place)}:
        try:
            listed[folder] = {entry.location for entry in list_folder(folder)}
        except FileNotFoundError:
            listed[folder] = set()
    absent = []
    for place in places:
        if is_local(place):
            is_there = local_path(place).is_file()
        else:
            is_there = is_web(place) or place in listed[parent(place)]
        if not is_there:
            absent.append(place)
    return absent


def _check_place(name: str, pair: RawPair, folder: str) -> None:
    """Raises ValueError for images outside the folder."""
    for image in (pair.image, pair.second_image):
        if isinstance(image, str) and not pair.from_folder:
            try:
                below(folder, image)
            except RefusedPath as error:
                raise ValueError(
                    f"{name}: {error}; give the folder that all images lie in (--images), or "
                    "--allow-outside for a list that you trust"
                ) from error


def _texts(name: str, pair: RawPair) -> Sample:
    """The columns of a sample without its images."""
    captions = pair.captions if isinstance(pair.captions, list) else [pair.captions]
    captions = [caption for caption in captions if caption is not None]
    sample: dict[str, Any] = {"id": pair.id, "source": name, "captions": captions}
    return sample if pair.annotations is None else sample | {"annotations": pair.annotations}
