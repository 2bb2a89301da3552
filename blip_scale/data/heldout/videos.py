"""Videos with captions for zero-shot retrieval, in the format of BLIP's MSRVTT list.

A line of msrvtt_test.jsonl is {clip_name, caption}. The video of a clip is a folder of that name
with one image file per frame, in the order of the file names. It may also be a video file of that
name; reading it requires the package av.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from blip_scale.data.captions import clean_caption
from blip_scale.data.pixels.decoding import decode_image
from blip_scale.data.pixels.formats import IMAGE_ENDINGS
from blip_scale.data.pixels.transforms import EvalTransform
from blip_scale.data.reading.stream_store import CorruptSample
from blip_scale.storage.locations import NotRegularFile, read_file
from blip_scale.storage.untrusted import RefusedPath, below, parse_json

MAX_WORDS = 40
"""Largest number of words in a caption (published)."""
_DIGITS = re.compile(r"(\d+)")
_VIDEO_ENDINGS = (".mp4", ".avi", ".webm", ".mkv", ".mov")
_FFMPEG = {"format_whitelist": "mov,mp4,avi,matroska,webm", "protocol_whitelist": "file"}
"""Options that limit FFmpeg to `_VIDEO_ENDINGS`. Playlists could read other files or URLs."""


class VideoSet:
    """A set of videos: video i is `ids[i]` with the cleaned texts `captions[i]`.

    Frames are read on demand. A video that can't be decoded is replaced by grey frames, which count
    as a miss, and is added to `unreadable`.
    """

    def __init__(
        self, annotations: Path, folder: Path, image_size: int, allow_outside: bool = False
    ):
        """Read the list of videos and find their files.

        Raises:
            FileNotFoundError: the list or videos are missing; the message gives their number.
            ValueError: a line is not {clip_name, caption}, or a clip lies outside `folder` without
                `allow_outside`.
        """
        self.name = annotations.name
        self.unreadable: dict[str, str] = {}
        self._transform = EvalTransform(image_size)
        texts = _read_list(annotations)
        self.ids = list(texts)
        if not allow_outside:
            for name in self.ids:
                _check_place(self.name, folder, name)
        self.captions = [[clean_caption(t, MAX_WORDS) for t in texts[name]] for name in self.ids]
        places = [_place_of(folder, name) for name in self.ids]
        missing = [name for name, place in zip(self.ids, places, strict=True) if place is None]
        if missing:
            raise FileNotFoundError(
                f"{self.name}: {len(missing)} of {len(places)} videos are missing in {folder}, the "
                f"first: {missing[0]} (a folder of frames, or a file {', '.join(_VIDEO_ENDINGS)})"
            )
        self._places = [place for place in places if place is not None]

    def __len__(self) -> int:
        return len(self.ids)

    def frames(self, index: int, count: int) -> Tensor:
        """Read `count` evenly spaced frames of a video, as uint8 [count, 3, H, W]."""
        try:
            return torch.stack([self._transform(image) for image in self._images(index, count)])
        except CorruptSample as error:
            self.unreadable[self.ids[index]] = str(error)
            size = self._transform.size
            return torch.full((count, 3, size, size), 128, dtype=torch.uint8)

    def _images(self, index: int, count: int) -> list[Image.Image]:
        path = self._places[index]
        if path.is_file():
            return _decode(path, count)
        files = _frames_in(path)
        try:
            chosen = [files[index] for index in frame_indices(len(files), count)]
            return [decode_image(read_file(str(file)), upright=True) for file in chosen]
        except NotRegularFile as error:
            raise CorruptSample(str(error)) from error


def frame_indices(length: int, count: int) -> list[int]:
    """Indices of the frames that the network gets.

    They start at 0 with a step of length // count, as published. A video with fewer than `count`
    frames repeats its last frame.
    """
    step = max(1, length // count)
    return [min(place * step, length - 1) for place in range(count)]


def _read_list(file: Path) -> dict[str, list[str]]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    texts: dict[str, list[str]] = {}
    # Only \n ends a line: a caption may hold U+2028, at which str.splitlines would split.
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item: dict[str, Any] = parse_json(line)
            texts.setdefault(str(item["clip_name"]), []).extend(_captions(item["caption"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}:{number}: not {{clip_name, caption}} ({error})") from error
    if not texts:
        raise ValueError(f"{file}: it lists no videos")
    return texts


def _captions(value: object) -> list[str]:
    """Captions of a line, which holds a string or a list of strings."""
    captions: list[str] = []
    for caption in value if isinstance(value, list) else [value]:
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"caption {caption!r} is not text")
        captions.append(caption)
    return captions


def _check_place(list_name: str, folder: Path, clip: str) -> None:
    """Refuse a clip outside the folder.

    Raises:
        ValueError: the clip lies outside.
    """
    try:
        below(str(folder), str(folder / clip))
    except RefusedPath as error:
        raise ValueError(
            f"{list_name}: {error}; give the folder of all videos (--images), or --allow-outside "
            "for a list that you trust"
        ) from error


def _place_of(folder: Path, name: str) -> Path | None:
    """Folder of frames or video file of a clip; None if there is neither."""
    frames = folder / name
    if frames.is_dir():
        return frames if _frames_in(frames) else None
    named = [folder / f"{name}{ending}" for ending in _VIDEO_ENDINGS]
    return next((path for path in (frames, *named) if path.is_file()), None)


def _frames_in(folder: Path) -> Sequence[Path]:
    """Frames sorted by the numbers in their names: frame2 comes before frame10."""
    frames = [file for file in folder.iterdir() if file.suffix.lower()[1:] in IMAGE_ENDINGS]
    return sorted(frames, key=_natural)


def _natural(file: Path) -> list[tuple[int, str]]:
    """Sort key of a name: runs of digits count as numbers."""
    return [(int(run), "") if run.isdigit() else (-1, run) for run in _DIGITS.split(file.name)]


def _decode(file: Path, count: int) -> list[Image.Image]:
    """Decode `count` evenly spaced frames of a video file."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{file} is a video file, which needs the package av: run `pip install av`, or give "
            "folders of frames"
        ) from error
    try:
        with av.open(str(file), options=_FFMPEG) as container:
            length = sum(1 for _ in container.decode(video=0))
        if not length:
            raise CorruptSample("no frame")
        wanted = frame_indices(length, count)
        images = {}
        with av.open(str(file), options=_FFMPEG) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    images[number] = frame.to_image()
        return [images[number] for number in wanted]
    except (av.FFmpegError, IndexError, KeyError) as error:
        raise CorruptSample(f"{type(error).__name__}: {error}") from error
