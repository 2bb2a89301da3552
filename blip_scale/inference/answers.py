"""Questions to a BLIP about image files, answered one after another in the order of the files.

Every answer is a dict for a line of JSON with the `image` that it is about; a file that can't be
read or decoded gives `image` and `error`. Answers don't depend on how images are batched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_scale.inference.blip import Blip, draws_of
from blip_scale.inference.images import batched, done_ahead, pixels_of
from blip_scale.model import BeamSettings, NucleusSettings

Answer = dict[str, Any]


@dataclass(frozen=True)
class Reader:
    """A BLIP and how image files come to it."""

    blip: Blip
    batch_size: int = 32
    threads: int = 4

    def embeds(self, paths: Sequence[str]) -> Iterator[tuple[list[str], Tensor, list[Answer]]]:
        """Batch by batch: paths that could be read, their image tokens [I, N, D], and the errors
        of the others."""

        def read(path: str) -> Tensor:
            return pixels_of(Path(path).read_bytes(), self.blip.image_size, upright=True)

        for group in batched(done_ahead(paths, read, self.threads), self.batch_size):
            pixels = [one.result for one in group if one.result is not None]
            errors = [{"image": d.item, "error": d.error} for d in group if d.result is None]
            embeds = self.blip.image_embeds(torch.stack(pixels)) if pixels else torch.empty(0)
            yield [one.item for one in group if one.result is not None], embeds, errors


@dataclass(frozen=True)
class CaptionSettings:
    """How captions are written."""

    decoding: BeamSettings | NucleusSettings
    prompt: str | None = None
    """How they begin; None: as the checkpoint was fine-tuned."""
    seed: int = 0
    """Of nucleus sampling, with the path of each image."""


def captions(reader: Reader, paths: Sequence[str], settings: CaptionSettings) -> Iterator[Answer]:
    """`caption` of every image."""
    reader.blip.require("caption")
    decoding = settings.decoding
    for names, embeds, errors in reader.embeds(paths):
        yield from errors
        if not names:
            continue
        draws = None
        if isinstance(decoding, NucleusSettings):
            draws = draws_of(names, settings.seed, decoding.max_length)
        said = reader.blip.captions(embeds, decoding, settings.prompt, draws)
        yield from ({"image": n, "caption": text} for n, text in zip(names, said, strict=True))


def matches(reader: Reader, paths: Sequence[str], texts: Sequence[str]) -> Iterator[Answer]:
    """For every image and text `itm`, the probability that they belong together, and `itc`, the
    cosine of their features."""
    reader.blip.require("match")
    text_features = reader.blip.text_features(texts)
    for names, embeds, errors in reader.embeds(paths):
        yield from errors
        if not names:
            continue
        cosines = reader.blip.image_features(embeds) @ text_features.T
        pairs = [(image, text) for image in range(len(names)) for text in range(len(texts))]
        probabilities = reader.blip.match(embeds, list(texts) * len(names), [i for i, _ in pairs])
        for (image, text), itm in zip(pairs, probabilities.tolist(), strict=True):
            itc = cosines[image, text].item()
            yield {"image": names[image], "text": texts[text], "itm": itm, "itc": itc}


def features(reader: Reader, paths: Sequence[str]) -> Iterator[Answer]:
    """`features` of every image, a list of numbers of norm 1."""
    reader.blip.require("embed")
    for names, embeds, errors in reader.embeds(paths):
        yield from errors
        if names:
            rows = reader.blip.image_features(embeds).tolist()
            yield from ({"image": n, "features": row} for n, row in zip(names, rows, strict=True))


def search(
    reader: Reader, paths: Sequence[str], text: str, top: int, rerank: int
) -> Iterator[Answer]:
    """The `top` images of a text, best first: by cosine (`itc`), or of the `rerank` best ones by
    the matching probability (`itm`)."""
    cosines: list[tuple[float, str]] = []
    query = reader.blip.text_features([text])[0]
    for answer in features(reader, paths):
        if "error" in answer:
            yield answer
        else:
            cosines.append((float(torch.tensor(answer["features"]) @ query), answer["image"]))
    cosines.sort(key=lambda pair: -pair[0])
    found: list[Answer] = [{"image": name, "itc": itc} for itc, name in cosines]
    if rerank:
        itc = {one["image"]: one["itc"] for one in found[:rerank]}
        again = matches(reader, list(itc), [text])
        matched = [
            {"image": one["image"], "itm": one["itm"], "itc": itc[one["image"]]}
            for one in again
            if "error" not in one
        ]
        found = sorted(matched, key=lambda one: -one["itm"])
    for rank, one in enumerate(found[:top], start=1):
        yield {"text": text, "rank": rank, **one}
