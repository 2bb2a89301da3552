"""Labelled images for zero-shot classification, and the names and templates of their classes.

The label of an image is the name of its folder or, in an MDS set, its first caption.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_scale.data.conversion.pairs import RawPair
from blip_scale.data.heldout.listed import listed_pairs
from blip_scale.data.heldout.pairs import HeldoutPairs
from blip_scale.data.pixels.formats import IMAGE_ENDINGS
from blip_scale.storage.locations import basename, extension, list_folder

CLIP_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""The seven templates that CLIP's authors chose for ImageNet. "itap" means "I took a picture"."""
_PLACES = ("{}", "{c}")
"""Placeholders for the class name in a template."""


def class_folders(location: str, image_size: int) -> HeldoutPairs:
    """Open a folder with one subfolder of images per class.

    Raises:
        FileNotFoundError: the folder does not exist or holds no image.
        ValueError: images lie outside of class folders.
    """
    files = list_folder(location, deep=True)
    images = [file for file in files if extension(file.name) in IMAGE_ENDINGS]
    if not images:
        raise FileNotFoundError(f"{location}: there is no image in its subfolders")
    loose = [image.name for image in images if "/" not in image.name]
    if loose:
        raise ValueError(
            f"{location}: {len(loose)} images are not in a class folder, the first: {loose[0]}; "
            "give a folder with one subfolder of images per class, or MDS shards"
        )
    pairs = []
    for image in images:
        label = image.name.partition("/")[0]
        pairs.append(RawPair(image.name, image.location, [label], from_folder=True))
    return listed_pairs(basename(location), pairs, image_size, clean=str)


def labels_of(pairs: HeldoutPairs) -> list[str]:
    """Label of every image.

    Raises:
        ValueError: an image has no text.
    """
    bare = [name for name, texts in zip(pairs.ids, pairs.captions, strict=True) if not texts]
    if bare:
        raise ValueError(f"{pairs.name}: {len(bare)} images have no label, the first: {bare[0]}")
    return [texts[0] for texts in pairs.captions]


def read_class_names(file: Path | None, labels: Iterable[str]) -> dict[str, str]:
    """Read the names of all classes, as a mapping from label to name, in order.

    Args:
        file: JSON object that maps labels to names, or a list of names (JSON, or one per line) in
            the order of the sorted labels. None: the labels with underscores replaced by spaces.
        labels: labels of the images.

    Raises:
        ValueError: a label has no name, or the numbers of names and labels differ.
    """
    distinct = sorted(set(labels))
    if file is None:
        return {label: label.replace("_", " ") for label in distinct}
    content = _read(file)
    if isinstance(content, dict):
        nameless = [label for label in distinct if label not in content]
        if nameless:
            raise ValueError(
                f"{file}: {len(nameless)} labels of the images have no name, the first: "
                f"{nameless[0]}"
            )
        return dict(zip(content, _texts(file, content.values()), strict=True))
    if len(content) != len(distinct):
        raise ValueError(
            f"{file}: {len(content)} names, but the images have {len(distinct)} labels; give a "
            "JSON object that maps labels to names if some classes have no image"
        )
    return dict(zip(distinct, _texts(file, content), strict=True))


def read_templates(file: Path | None) -> list[str]:
    """Read templates from a file (a JSON list, or one per line); None gives CLIP's seven.

    Raises:
        ValueError: there is no template, or a template lacks the placeholder `{}`.
    """
    if file is None:
        return list(CLIP_TEMPLATES)
    content = _read(file)
    templates = [] if isinstance(content, dict) else _texts(file, content)
    for template in templates:
        if not any(place in template for place in _PLACES):
            raise ValueError(
                f"{file}: the template {template!r} lacks {{}}, the place of the class name"
            )
    if not templates:
        raise ValueError(f"{file}: expected a list of templates, such as `a photo of a {{}}.`")
    return templates


def fill_template(template: str, name: str) -> str:
    """Put a class name into a template."""
    for place in _PLACES:
        template = template.replace(place, name)
    return template


def label_numbers(labels: Sequence[str], classes: Iterable[str]) -> Tensor:
    """Index of each label in `classes`, as an int64 tensor."""
    numbers = {label: number for number, label in enumerate(classes)}
    return torch.tensor([numbers[label] for label in labels], dtype=torch.int64)


def _texts(file: Path, values: Iterable[Any]) -> list[str]:
    """Check that all values are non-empty strings, and return them.

    Raises:
        ValueError: a value is empty or not a string.
    """
    texts = list(values)
    odd = [text for text in texts if not isinstance(text, str) or not text.strip()]
    if odd:
        raise ValueError(f"{file}: expected non-empty strings, not {odd[0]!r}")
    return texts


def _read(file: Path) -> Any:
    """Read a JSON list or object, or the non-empty lines of a text file."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}); save it as UTF-8") from error
    if file.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, list | dict):
        raise ValueError(f"{file}: expected a list or an object, not {type(content).__name__}")
    return content
