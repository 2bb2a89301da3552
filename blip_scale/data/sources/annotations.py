"""What the readers of annotation files share: JSON lists, and images that are named by a path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blip_scale.data.conversion.pairs import Found, Reason, Reject, Source
from blip_scale.data.sources.metadata import caption_keys, first_of, pair_of
from blip_scale.storage.locations import basename, is_folder, join, list_folder, open_file, parent
from blip_scale.storage.untrusted import parse_json

_IMAGE_KEYS = ("image", "file_name", "filename", "image_path", "path", "file")


def load_json(location: str) -> Any:
    """Raises ValueError, with the place, for what is no JSON."""
    with open_file(location) as file:
        try:
            return parse_json(file.read())
        except ValueError as error:
            raise ValueError(f"{location} is no JSON: {error}") from error


def load_list(location: str, of: str) -> list[Any]:
    """Raises ValueError for a file that holds no JSON list; `of` says what it should hold."""
    items = load_json(location)
    if not isinstance(items, list):
        raise ValueError(f"{location} holds no list of {of}")
    return items


def json_files(location: str) -> list[str]:
    """The file, or the .json files of a folder in the order of their names."""
    if not is_folder(location):
        return [location]
    files = [e.location for e in list_folder(location) if e.name.endswith((".json", ".json.gz"))]
    if not files:
        raise FileNotFoundError(f"{location}: there is no .json")
    return files


def image_location(source: Source, annotations: str, path: str) -> str:
    """Where the image lies that `annotations` calls `path`."""
    return join(source.images or parent(annotations), path.removeprefix(source.strip_prefix))


def pair_of_item(source: Source, annotations: str, number: int, item: Any) -> Found:
    """The pair of one item of a list: {image or url, caption, ...}.

    Its id is the image's path or URL as the list has it, without `strip_prefix`.
    """
    place = f"{basename(annotations)}:{number}"
    if not isinstance(item, Mapping):
        return Reject(place, Reason.DAMAGED_INPUT, f"no object but {type(item).__name__}")
    path = first_of(item, _IMAGE_KEYS)
    url = first_of(item, ("url", "URL"))
    if not isinstance(path or url, str):
        return Reject(place, Reason.MISSING_KEY, f"one of {', '.join(_IMAGE_KEYS)}, url")
    captions = first_of(item, caption_keys(source.caption_key))
    if path is None:
        return pair_of(url, url, captions, item)
    name = path.removeprefix(source.strip_prefix)
    return pair_of(name, image_location(source, annotations, path), captions, item)
