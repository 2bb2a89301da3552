"""Answers of checkpoints for the demo page. No code of the page itself."""

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
"""Name of the mean of all words' maps."""
_SHOWN = 12
"""Images that a search shows, and the gallery before the first search."""
_EXAMPLES = 6
_SHOWN_SIDE = 800
"""Most pixels of a side of an image that is sent to the browser."""
_RERANKED = 32
"""Images of a search that are re-ranked by matching."""


@dataclass
class Service:
    """Answers for the page. Methods raise ValueError with a line for the user."""

    blips: list[Blip]
    images: list[str]
    """Paths of the images to show as examples and to search in."""
    labels: dict[str, str] = field(default_factory=dict)
    """Name to show below an image, by path; the name of the file where there is none."""
    records: list[TrainingRecord | None] = field(default_factory=list)
    """Training of each checkpoint."""
    features: dict[str, list[float]] = field(default_factory=dict)
    """Features of `images` by path, computed at the first search."""

    def able(self, use: Use) -> Blip | None:
        """The first checkpoint that serves a use."""
        return next((blip for blip in self.blips if blip.serves(use)), None)

    def blip_for(self, use: Use) -> Blip:
        """The first checkpoint that serves a use; raises ValueError without one."""
        blip = self.able(use)
        if blip is None:
            raise ValueError(f"none of the checkpoints can {use}; start the page with one that can")
        return blip

    def caption(self, image: str | None, method: str, beams: int, seed: int) -> str:
        """Caption of an image file."""
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
        """Answer to a question about an image file."""
        blip = self.blip_for("vqa")
        path = _required(image)
        if not question.strip():
            raise ValueError("type a question first")
        answer: str = _decoded(predictions.replies(Reader(blip), [path], [question]))[0]["answer"]
        return answer

    def match(self, image: str | None, texts: str) -> list[list[str]]:
        """Rows of text, matching probability and cosine, best first.

        Args:
            image: path.
            texts: one a line.
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
        """Words of a caption, each with its heat map over the image; the mean of all comes first.

        Args:
            image: path.
            text: caption; an empty one takes the checkpoint's own.
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
        """The best images of a text, scaled down, each with its score and name.

        Pixels leave, not files: whatever else lies among the images is never served.
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
        """Some images, evenly over all, scaled down, each with its name."""
        return [(_scaled_down(path), self.label(path)) for path in self._some(count)]

    def examples(self) -> list[tuple[Image.Image, str]]:
        """The images to choose one from."""
        return self.thumbnails(_EXAMPLES)

    def _some(self, count: int) -> list[str]:
        """Paths of `count` images that can be decoded, evenly over all."""
        step = max(1, len(self.images) // count)
        paths: list[str] = []
        for path in [*self.images[::step], *self.images]:
            if len(paths) < count and path not in paths and _is_decodable(path):
                paths.append(path)
        return paths

    def label(self, path: str) -> str:
        """Name to show below an image."""
        return self.labels.get(path) or Path(path).stem


def _required(image: str | None) -> str:
    if image is None:
        raise ValueError("drop an image first")
    return image


def _decoded(answers: Iterable[Answer]) -> list[Answer]:
    """Answers about one image; raises ValueError where it could not be read."""
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
