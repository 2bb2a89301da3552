"""Evaluate on images listed in an annotation file, without converting them to shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from blip_scale.data.captions import RoleText, clean_caption
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
    items: Iterable[Found],
    image_size: int,
    clean: Callable[[str], str] = clean_caption,
    images_below: str | None = None,
) -> HeldoutPairs:
    """Build a held-out set from the items of a reader. Images are read on demand, not screened.

    Args:
        name: name of the set.
        items: pairs and rejects of the reader.
        image_size: side of the square input in pixels.
        clean: function that cleans a caption.
        images_below: folder that must contain all listed images; None allows any place.

    Raises:
        ValueError: an item can't be used, or there is none.
        FileNotFoundError: images are missing. The message gives their number and names the first.
    """
    listed = list(items)
    pairs = [item for item in listed if isinstance(item, RawPair)]
    broken = [f"{item.id}: {item.reason}" for item in listed if isinstance(item, Reject)]
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
            f"{name}: {len(absent)} images are missing, the first: {absent[0]}; give the folder of "
            "the images (--images), and the prefix to remove from their paths (--strip-prefix)"
        )

    def encoded(index: int) -> Sample:
        images = {"image": pairs[index].image, "second_image": pairs[index].second_image}
        sample = {}
        for column, image in images.items():
            if image is not None:
                sample[column] = read_file(image) if isinstance(image, str) else image
        return sample

    return HeldoutPairs(name, (_texts(name, pair) for pair in pairs), encoded, image_size, clean)


def _absent(places: list[str]) -> list[str]:
    """Return the locations that do not exist.

    Each folder of object storage is listed once. Images on web servers are not checked here.
    """
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
    """Refuse images outside a folder.

    Raises:
        ValueError: an image lies outside.
    """
    for image in (pair.image, pair.second_image):
        if isinstance(image, str) and not pair.from_folder:
            try:
                below(folder, image)
            except RefusedPath as error:
                raise ValueError(
                    f"{name}: {error}; give the folder of all images (--images), or "
                    "--allow-outside for a list that you trust"
                ) from error


def _texts(name: str, pair: RawPair) -> Sample:
    """Columns of a sample without its images."""
    captions = pair.captions if isinstance(pair.captions, list) else [pair.captions]
    texts = [caption.text if isinstance(caption, RoleText) else caption for caption in captions]
    present = [number for number, text in enumerate(texts) if text is not None]
    texts = [texts[number] for number in present]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name}: {pair.id}: a caption is not a string: {str(text)[:50]}")
    sample: dict[str, Any] = {"id": pair.id, "source": name, "captions": texts}
    if pair.annotations is not None:  # one per text
        sample["annotations"] = [pair.annotations[number] for number in present]
    return sample
