"""Questions to a BLIP about image files, answered one after another in the order of the files.

Every answer is a dict for a line of JSON with the `image` that it is about; a file that can't be
read or decoded gives `image` and `error`. Answers don't depend on how images are batched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_scale.inference.blip import Blip, draws_of
from blip_scale.inference.images import batched, done_ahead, pixels_of
from blip_scale.model.generation import BeamSettings, NucleusSettings

Answer = dict[str, Any]
About = Callable[[list[str], Tensor], list[list[Answer]]]
"""about(paths, image tokens [I, N, D]): the answers about each image."""


@dataclass(frozen=True)
class Reader:
    """A BLIP and how image files come to it."""

    blip: Blip
    batch_size: int = 32
    threads: int = 4

    def ask(self, paths: Sequence[str], about: About) -> Iterator[Answer]:
        """What `about` says of every image, or its error."""

        def read(path: str) -> Tensor:
            return pixels_of(Path(path).read_bytes(), self.blip.image_size, upright=True)

        for group in batched(done_ahead(paths, read, self.threads), self.batch_size):
            pixels = [one.result for one in group if one.result is not None]
            names = [one.item for one in group if one.result is not None]
            said = iter(about(names, self.blip.image_embeds(torch.stack(pixels))) if names else [])
            for one in group:
                if one.result is None:
                    yield {"image": one.item, "error": one.error}
                else:
                    yield from next(said)


@dataclass(frozen=True)
class CaptionSettings:
    """How captions are written."""

    decoding: BeamSettings | NucleusSettings
    prompt: str | None = None
    """How they begin; None: as the checkpoint was fine-tuned."""
    seed: int = 0
    """Of nucleus sampling, with the path of each image."""
    count: int = 1
    """Captions of each image: the best of beam search, or so many draws."""


def captions(reader: Reader, paths: Sequence[str], settings: CaptionSettings) -> Iterator[Answer]:
    """`caption` of every image; of several captions an image the list `captions`."""
    blip, decoding, count = reader.blip, settings.decoding, settings.count
    blip.require("caption")
    if isinstance(decoding, BeamSettings):
        decoding = replace(decoding, captions=count)

    def about(names: list[str], embeds: Tensor) -> list[list[Answer]]:
        draws = None
        if isinstance(decoding, NucleusSettings):
            embeds = embeds.repeat_interleave(count, dim=0)
            drawn = [_drawn_id(name, number) for name in names for number in range(count)]
            draws = draws_of(drawn, settings.seed, decoding.max_length)
        texts = blip.captions(embeds, decoding, settings.prompt, draws)
        if count == 1:
            return [[{"image": n, "caption": text}] for n, text in zip(names, texts, strict=True)]
        of_each = batched(texts, count)
        return [[{"image": n, "captions": own}] for n, own in zip(names, of_each, strict=True)]

    return reader.ask(paths, about)


def _drawn_id(name: str, number: int) -> str:
    """What the random numbers of an image's caption follow from; the first is that of one alone."""
    return f"{name}\0{number}" if number else name


def matches(reader: Reader, paths: Sequence[str], texts: Sequence[str]) -> Iterator[Answer]:
    """For every image and text `itm`, the probability that they belong together, and `itc`, the
    cosine of their features."""
    blip = reader.blip
    blip.require("match")
    text_features = blip.text_features(texts)

    def about(names: list[str], embeds: Tensor) -> list[list[Answer]]:
        cosines_IS = blip.image_features(embeds) @ text_features.T
        owners = [image for image in range(len(names)) for _ in texts]
        probabilities = blip.match(embeds, list(texts) * len(names), owners)
        return [
            [
                {"image": name, "text": text, "itm": itm, "itc": itc}
                for text, itm, itc in zip(texts, row, cosines, strict=True)
            ]
            for name, row, cosines in zip(
                names, probabilities.view(-1, len(texts)).tolist(), cosines_IS.tolist(), strict=True
            )
        ]

    return reader.ask(paths, about)


def replies(reader: Reader, paths: Sequence[str], questions: Sequence[str]) -> Iterator[Answer]:
    """The `answer` to every question about every image."""
    blip = reader.blip
    blip.require("vqa")

    def about(names: list[str], embeds: Tensor) -> list[list[Answer]]:
        owners = [image for image in range(len(names)) for _ in questions]
        said = iter(blip.answers(embeds, list(questions) * len(names), owners))
        return [
            [{"image": name, "question": q, "answer": next(said)} for q in questions]
            for name in names
        ]

    return reader.ask(paths, about)


def features(reader: Reader, paths: Sequence[str]) -> Iterator[Answer]:
    """`features` of every image, a list of numbers of norm 1."""
    blip = reader.blip
    blip.require("embed")

    def about(names: list[str], embeds: Tensor) -> list[list[Answer]]:
        rows = blip.image_features(embeds).tolist()
        return [[{"image": n, "features": row}] for n, row in zip(names, rows, strict=True)]

    return reader.ask(paths, about)


def search(
    reader: Reader,
    paths: Sequence[str],
    text: str,
    top: int,
    rerank: int,
    known: dict[str, list[float]] | None = None,
) -> Iterator[Answer]:
    """Errors first; then the `top` images of a text, best first: by cosine (`itc`), or of the
    `rerank` best ones by the matching probability (`itm`).

    Args:
        known: features of images by path, which are not computed again; takes the new ones.
    """
    query = reader.blip.text_features([text])[0]
    known = {} if known is None else known
    for answer in features(reader, [path for path in paths if path not in known]):
        if "error" in answer:
            yield answer
        else:
            known[answer["image"]] = answer["features"]
    rows = {path: known[path] for path in paths if path in known}
    cosines = (torch.tensor(list(rows.values())) @ query).tolist() if rows else []
    itc = dict(zip(rows, cosines, strict=True))
    ranked = sorted(itc, key=lambda name: -itc[name])
    found: list[Answer] = [{"image": name, "itc": itc[name]} for name in ranked]
    if rerank:
        matched = matches(reader, ranked[:rerank], [text])
        found = [one | {"itc": itc[one["image"]]} for one in matched if "error" not in one]
        found.sort(key=lambda one: -one["itm"])
    for rank, one in enumerate(found[:top], start=1):
        yield {"text": text, "rank": rank, **one}
