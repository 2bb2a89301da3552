"""Run checkpoints for the demo page. The layout of the page is in `page_layout`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from blip_scale.data.pixels.decoding import decode_image
from blip_scale.data.reading.stream_store import CorruptSample
from blip_scale.inference import predictions
from blip_scale.inference.blip import Blip, Use
from blip_scale.inference.heat_sheet import overlay
from blip_scale.inference.predictions import Answer, Reader
from blip_scale.inference.training_record import TrainingRecord
from blip_scale.model.generation import BeamSettings, NucleusSettings
from blip_scale.storage.locations import read_file

BEAM, NUCLEUS = "beam search", "nucleus sampling"
WHOLE_CAPTION = "whole caption"
"""Label of the mean of all words' heat maps."""
_SHOWN = 12
"""Number of images shown by a search, and in the gallery before the first search."""
_EXAMPLES = 6
_SHOWN_SIDE = 800
"""Maximum side, in pixels, of an image sent to the browser."""
_RERANKED = 32
"""Number of search results that are re-ranked by matching."""


@dataclass
class Service:
    """Functions of the page. Methods raise ValueError with a one-line message for the user."""

    blips: list[Blip]
    images: list[str]
    """Paths of the images that are shown as examples and searched."""
    labels: dict[str, str] = field(default_factory=dict)
    """Path of an image -> label below it. An image without an entry is labelled with its file
    name."""
    records: list[TrainingRecord | None] = field(default_factory=list)
    """Training record of each checkpoint; None for a checkpoint without one."""
    features: dict[str, list[float]] = field(default_factory=dict)
    """Path of an image -> its features. They are computed by the first search."""

    def able(self, use: Use) -> Blip | None:
        """Return the first checkpoint that serves a use, or None."""
        return next((blip for blip in self.blips if blip.serves(use)), None)

    def blip_for(self, use: Use) -> Blip:
        """Return the first checkpoint that serves a use.

        Raises:
            ValueError: no checkpoint serves it.
        """
        blip = self.able(use)
        if blip is None:
            raise ValueError(f"none of the checkpoints can {use}; start the page with one that can")
        return blip

    def caption(self, image: str | None, method: str, beams: int, seed: int) -> str:
        """Generate a caption for an image file."""
        blip = self.blip_for("caption")
        output = blip.output
        decoding: BeamSettings | NucleusSettings = replace(output.beam(), num_beams=int(beams))
        if method == NUCLEUS:
            decoding = NucleusSettings(max_length=output.max_length, min_length=output.min_length)
        settings = predictions.CaptionSettings(decoding, seed=int(seed))
        answers = predictions.captions(Reader(blip), [_required(image)], settings)
        caption: str = _decoded(answers)[0]["caption"]
        return caption

    def answer(self, image: str | None, question: str) -> str:
        """Answer a question about an image file."""
        blip = self.blip_for("vqa")
        path = _required(image)
        if not question.strip():
            raise ValueError("type a question first")
        answer: str = _decoded(predictions.replies(Reader(blip), [path], [question]))[0]["answer"]
        return answer

    def match(self, image: str | None, texts: str) -> list[list[str]]:
        """Return rows of text, matching probability and cosine, with the best match first.

        Args:
            image: path of the image.
            texts: the texts, one per line.
        """
        blip = self.blip_for("match")
        path = _required(image)
        lines = [line.strip() for line in texts.splitlines() if line.strip()]
        if not lines:
            raise ValueError("type a text first; several go on lines of their own")
        answers = _decoded(predictions.matches(Reader(blip), [path], lines))
        answers.sort(key=lambda answer: -answer["itm"])
        return [[a["text"], f"{a['itm']:.3f}", f"{a['itc']:.3f}"] for a in answers]

    def explain(self, image: str | None, text: str) -> list[tuple[str, Image.Image]]:
        """Return each word of a caption with its heat map drawn over the image.

        The first entry is the mean of all maps.

        Args:
            image: path of the image.
            text: caption; if empty, the checkpoint generates one.
        """
        blip = self.blip_for("match")
        path = _required(image)
        caption = text.strip() or None
        if caption is None and not blip.serves("caption"):
            raise ValueError("type a caption first; this checkpoint writes none")
        (answer,) = _decoded(predictions.explanations(Reader(blip), [path], caption))
        shown, result = _scaled_down(path), answer["maps"]
        maps = [(WHOLE_CAPTION, overlay(shown, result.mean))]
        for word, heat in zip(result.words, result.maps, strict=True):
            maps.append((word, overlay(shown, heat)))
        return maps

    def search(self, text: str, rerank: bool) -> list[tuple[Image.Image, str]]:
        """Return the images that match a text best, scaled down, each with its score and label.

        Only pixels are sent to the browser, never files. Other files in the folder of the images
        are therefore never served.
        """
        reader = Reader(self.blip_for("embed"))
        if not self.images:
            raise ValueError("there are no images to search; start the page with --images FOLDER")
        if not text.strip():
            raise ValueError("type a text first")
        answers = predictions.search(
            reader, self.images, text, _SHOWN, _RERANKED if rerank else 0, self.features
        )
        results = []
        for answer in answers:
            if "error" not in answer:
                name = f"{_score(answer)} · {self.label(answer['image'])}"
                results.append((_scaled_down(answer["image"]), name))
        return results

    def thumbnails(self, count: int = _SHOWN) -> list[tuple[Image.Image, str]]:
        """Return evenly spaced images, scaled down, each with its label."""
        return [(_scaled_down(path), self.label(path)) for path in self._some(count)]

    def examples(self) -> list[tuple[Image.Image, str]]:
        """Return the example images from which the user can select."""
        return self.thumbnails(_EXAMPLES)

    def _some(self, count: int) -> list[str]:
        """Return the paths of up to `count` decodable images, evenly spaced if possible."""
        step = max(1, len(self.images) // count)
        paths: list[str] = []
        for path in [*self.images[::step], *self.images]:
            if len(paths) < count and path not in paths and _is_decodable(path):
                paths.append(path)
        return paths

    def label(self, path: str) -> str:
        """Return the label below an image."""
        return self.labels.get(path) or Path(path).stem


def _required(image: str | None) -> str:
    if image is None:
        raise ValueError("drop an image first")
    return image


def _decoded(answers: Iterable[Answer]) -> list[Answer]:
    """Return the answers about one image as a list.

    Raises:
        ValueError: the image could not be read.
    """
    rows = list(answers)
    if "error" in rows[0]:
        raise ValueError(f"this image can't be used: {rows[0]['error']}")
    return rows


def _scaled_down(path: str) -> Image.Image:
    image = decode_image(read_file(path), upright=True)
    image.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    return image


def _is_decodable(path: str) -> bool:
    try:
        decode_image(read_file(path))
    except (OSError, CorruptSample):
        return False
    return True


def _score(answer: Answer) -> str:
    return f"match {answer['itm']:.2f}" if "itm" in answer else f"cosine {answer['itc']:.2f}"
