"""Functions shared by readers of annotation files: JSON lists, and images named by paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from blip_scale.data.conversion.pairs import Found, Reason, Reject, Source
from blip_scale.data.conversion.report import shortened
from blip_scale.data.pixels.decoding import describe
from blip_scale.data.sources.metadata import (
    URL_KEYS,
    captions_of,
    embedded_image,
    first_of,
    id_of,
    note_of,
    pair_of,
)
from blip_scale.errors import RefusedInput
from blip_scale.storage.locations import (
    basename,
    is_folder,
    is_local,
    join,
    list_folder,
    local_path,
    open_file,
    parent,
)
from blip_scale.storage.untrusted import parse_json

IMAGE_KEYS = (
    "image", "file_name", "filename", "image_path", "path", "file", "image_name", "filepath",
    "file_path",
)  # fmt: skip
"""Names of fields that hold the path of an image."""
_LARGEST_UNPACKED_BYTES = 2_000_000_000


def load_json(location: str) -> Any:
    """Load a JSON file.

    Raises:
        ValueError: the file is not JSON. The message names the place.
    """
    return parse_at(_whole(location), location)


def load_list(location: str, of: str) -> list[Any]:
    """Load a JSON list, or a file with one object per line.

    Args:
        location: the file.
        of: description of the expected items, for the error.

    Raises:
        ValueError: the file holds neither.
    """
    content = _whole(location)
    try:
        items = parse_at(content, location)
    except ValueError:
        lines = [line for line in content.split(b"\n") if line.strip()]
        if len(lines) < 2 or not lines[0].strip().startswith(b"{"):
            raise
        return [parse_at(line, f"{location}:{n}") for n, line in enumerate(lines, start=1)]
    if not isinstance(items, list):
        content_kind = note_of(items) if isinstance(items, dict) else type(items).__name__
        raise ValueError(f"{location} holds no list of {of} ({shortened(content_kind)})")
    return items


def _whole(location: str) -> bytes:
    """Read a whole file. Raise RefusedInput if a .gz unpacks to more than the limit."""
    is_packed = location.endswith(".gz")
    with open_file(location) as file:
        content = file.read(_LARGEST_UNPACKED_BYTES + 1 if is_packed else -1)
    if is_packed and len(content) > _LARGEST_UNPACKED_BYTES:
        raise RefusedInput(
            f"{location} unpacks to more than {_LARGEST_UNPACKED_BYTES / 1e9:.0f} GB: unpack it "
            "yourself if that is right"
        )
    return content


def parse_at(content: bytes, place: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: the content is not JSON. The message names the place.
    """
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error


def read_items(
    location: str, items: Iterable[Any], make: Callable[[int, Any], Found]
) -> Iterator[Found]:
    """Apply `make(number, item)` to each item. If it fails, yield a reject for the item."""
    for number, item in enumerate(items):
        yield read_item(location, number, item, make)


def read_item(location: str, number: int, item: Any, make: Callable[[int, Any], Found]) -> Found:
    """Return `make(number, item)`, or a reject if it fails."""
    try:
        return make(number, item)
    except Exception as error:  # an item may hold anything
        return Reject(f"{basename(location)}:{number}", Reason.DAMAGED_INPUT, describe(error))


def json_files(location: str) -> list[str]:
    """Return the file itself, or the .json files of a folder in the order of their names."""
    if not is_folder(location):
        return [location]
    files = [e.location for e in list_folder(location) if e.name.endswith((".json", ".json.gz"))]
    if not files:
        raise FileNotFoundError(f"{location}: there is no .json")
    return files


def image_location(source: Source, annotations: str, path: str) -> str:
    """Return the location of the image with this path in the file `annotations`."""
    return _place(source, annotations, path)[1]


def image_id(source: Source, annotations: str, path: str) -> str:
    """Return the id of an image: its path without `strip_prefix`."""
    return _place(source, annotations, path)[0]


def _place(source: Source, annotations: str, path: str) -> tuple[str, str]:
    """Return id and location of the image with this path in the file `annotations`."""
    folder, prefix = source.images or parent(annotations), source.strip_prefix
    name = path.removeprefix(prefix)
    location = join(folder, name)
    if "\\" in path and is_local(location) and not local_path(location).exists():
        # The list was made on Windows.
        name = path.replace("\\", "/").removeprefix(prefix.replace("\\", "/"))
        location = join(folder, name)
    return name.removeprefix("./"), location


def pair_of_item(source: Source, annotations: str, number: int, item: Any) -> Found:
    """Build a pair from one item of a list: {image or url, caption, ...}.

    The pair's id is the image's path in the list without `strip_prefix`, or its URL.
    """
    place = f"{basename(annotations)}:{number}"
    if not isinstance(item, Mapping):
        return Reject(place, Reason.DAMAGED_INPUT, f"not an object but {type(item).__name__}")
    path = first_of(item, (source.image_key,) if source.image_key else IMAGE_KEYS) or None
    url = first_of(item, URL_KEYS)
    captions = captions_of(item, source.caption_key)
    if not isinstance(path or url, str):
        count = len(captions) if isinstance(captions, list) else int(captions is not None)
        wanted = f"none of {', '.join(IMAGE_KEYS)}, url is text; {note_of(item)}"
        return Reject(place, Reason.MISSING_KEY, wanted, captions=count)
    if path is None:
        return pair_of(url, url, captions, item)
    embedded = embedded_image(path)
    if embedded is not None:
        return pair_of(id_of(item) or place, embedded, captions, item)
    name, location = _place(source, annotations, path)
    return pair_of(name, location, captions, item)
