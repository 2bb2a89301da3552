"""Predictions of a BLIP for image files, in the order of the files.

Every answer is a dict for one line of JSON, and names its `image`. For a file that cannot be read
or decoded, it holds `image` and `error`. Answers do not depend on the batch size.

Shapes: I images, N image tokens, D width, S texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_scale.config.bounds import MOST_BEAMS
from blip_scale.data.captions import clean_caption
from blip_scale.inference.arguments import paths_of, texts_of
from blip_scale.inference.blip import Blip, draws_of
from blip_scale.inference.images import batched, done_ahead, pixels_of
from blip_scale.inference.word_maps import word_maps
from blip_scale.model.generation import BeamSettings, NucleusSettings

Answer = dict[str, Any]
About = Callable[[list[str], Tensor], list[list[Answer]]]
"""Function from paths and image tokens [I, N, D] to the answers for each image."""


@dataclass(frozen=True)
class Reader:
    """A BLIP, and settings for reading image files."""

    blip: Blip
    batch_size: int = 32
    threads: int = 4

    def ask(self, paths: str | Sequence[str], about: About) -> Iterator[Answer]:
        """Yield the answers of `about`, or the error, for every image; `paths` may be one str."""

        def read(path: str) -> Tensor:
            return pixels_of(Path(path).read_bytes(), self.blip.image_size, upright=True)

        for group in batched(done_ahead(paths_of(paths), read, self.threads), self.batch_size):
            pixels, names = [], []
            for image in group:
                if image.result is not None:
                    pixels.append(image.result)
                    names.append(image.item)
            answers: Iterator[list[Answer]] = iter(())
            if names:
                answers = iter(about(names, self.blip.image_embeds(torch.stack(pixels))))
            for image in group:
                if image.result is None:
                    yield {"image": image.item, "error": image.error}
                else:
                    yield from next(answers)


@dataclass(frozen=True)
class CaptionSettings:
    """Settings of caption generation."""

    decoding: BeamSettings | NucleusSettings
    prompt: str | None = None
    """Beginning of every caption. None: the checkpoint's prompt."""
    seed: int = 0
    """Seed of nucleus sampling, combined with the path of each image."""
    count: int = 1
    """Number of captions per image: the best of beam search, or independent samples."""


def captions(
    reader: Reader, paths: str | Sequence[str], settings: CaptionSettings
) -> Iterator[Answer]:
    """Yield the `caption` of every image, or the list `captions` if there are several."""
    blip, decoding, count = reader.blip, settings.decoding, settings.count
    blip.require("caption")
    if not 1 <= count <= MOST_BEAMS:
        raise ValueError(f"captions: {count} of an image, expected 1 to {MOST_BEAMS}")
    if isinstance(decoding, BeamSettings):
        decoding = replace(decoding, captions=count)

    def about(names: list[str], embeds: Tensor) -> list[list[Answer]]:
        draws = None
        if isinstance(decoding, NucleusSettings):
            embeds = embeds.repeat_interleave(count, dim=0)
            draws = draws_of(_draw_ids(names, count), settings.seed, decoding.max_length)
        texts = blip.captions(embeds, decoding, settings.prompt, draws)
        answers: list[list[Answer]] = []
        for name, group in zip(names, batched(texts, count), strict=True):
            fields = {"caption": group[0]} if count == 1 else {"captions": group}
            answers.append([{"image": name, **fields}])
        return answers

    return reader.ask(paths, about)


def _draw_ids(names: Sequence[str], count: int) -> list[str]:
    """Return the ids of the random numbers for `count` captions of each image.

    The first caption has the same id as with `count` 1, so it does not depend on `count`.
    """
    ids = []
    for name in names:
        ids += [name, *(f"{name}\0{number}" for number in range(1, count))]
    return ids


def matches(
    reader: Reader, paths: str | Sequence[str], texts: str | Sequence[str]
) -> Iterator[Answer]:
    """Yield `itm`, the matching probability, and `itc`, the cosine, of every image and text.

    Raises:
        ValueError: the checkpoint does not support matching, or a text holds no word.
    """
    blip = reader.blip
    blip.require("match")
    texts = _with_words(texts, "text")
    text_features = blip.text_features(texts)

    def about(names: list[str], embeds: Tensor) -> list[list[Answer]]:
        cosines_IS = blip.image_features(embeds) @ text_features.T
        owners = _repeated(len(names), len(texts))
        probabilities_IS = blip.match(embeds, list(texts) * len(names), owners).view(len(names), -1)
        answers: list[list[Answer]] = []
        for name, itms, itcs in zip(
            names, probabilities_IS.tolist(), cosines_IS.tolist(), strict=True
        ):
            scored = zip(texts, itms, itcs, strict=True)
            answers.append(
                [{"image": name, "text": text, "itm": itm, "itc": itc} for text, itm, itc in scored]
            )
        return answers

    return reader.ask(paths, about)


def replies(
    reader: Reader, paths: str | Sequence[str], questions: str | Sequence[str]
) -> Iterator[Answer]:
    """Yield the `answer` to every question about every image.

    Raises:
        ValueError: the checkpoint does not support VQA, or a question holds no word.
    """
    blip = reader.blip
    blip.require("vqa")
    questions = _with_words(questions, "question")

    def about(names: list[str], embeds: Tensor) -> list[list[Answer]]:
        owners = _repeated(len(names), len(questions))
        written = blip.answers(embeds, list(questions) * len(names), owners)
        answers: list[list[Answer]] = []
        for name, group in zip(names, batched(written, len(questions)), strict=True):
            pairs = zip(questions, group, strict=True)
            answers.append([{"image": name, "question": q, "answer": a} for q, a in pairs])
        return answers

    return reader.ask(paths, about)


def _repeated(images: int, texts: int) -> list[int]:
    """Return the image of each text, if every image has the same number of texts."""
    return torch.arange(images).repeat_interleave(texts).tolist()


def features(reader: Reader, paths: str | Sequence[str]) -> Iterator[Answer]:
    """Yield the `features` of every image, an L2-normalised list of numbers."""
    blip = reader.blip
    blip.require("embed")

    def about(names: list[str], embeds: Tensor) -> list[list[Answer]]:
        rows = blip.image_features(embeds).tolist()
        return [[{"image": n, "features": row}] for n, row in zip(names, rows, strict=True)]

    return reader.ask(paths, about)


def explanations(reader: Reader, paths: str | Sequence[str], text: str | None) -> Iterator[Answer]:
    """Yield the `text`, its matching probability `itm` and its `WordMaps` `maps` for every image.

    Args:
        text: caption of every image. None: the caption that the checkpoint generates.

    Raises:
        ValueError: the checkpoint does not support matching, there is no text and the checkpoint
            does not support captioning, or the text holds no word.
    """
    blip = reader.blip
    blip.require("match")
    if text is None and not blip.serves("caption"):
        raise ValueError(
            f"{blip.origin} is a {blip.head} checkpoint and writes no captions; give --text"
        )
    if text is not None:
        _with_words(text, "text")

    def about(names: list[str], embeds: Tensor) -> list[list[Answer]]:
        texts = [text] * len(names) if text else blip.captions(embeds, blip.output.beam())
        kept = [place for place, written in enumerate(texts) if has_words(written)]
        maps = iter(word_maps(blip, embeds[kept], [texts[place] for place in kept]))
        answers: list[list[Answer]] = []
        for name, written in zip(names, texts, strict=True):
            if has_words(written):
                result = next(maps)
                fields = {"text": result.text, "itm": result.probability, "maps": result}
            else:
                fields = {"error": "the checkpoint's caption of it holds no word; give --text"}
            answers.append([{"image": name, **fields}])
        return answers

    return reader.ask(paths, about)


def has_words(text: str) -> bool:
    """Whether a cleaned text holds a letter or a digit."""
    return any(letter.isalnum() for letter in clean_caption(text))


def _with_words(texts: str | Sequence[str], kind: str) -> list[str]:
    """List the texts, and raise ValueError for one without words.

    The network would score such a text without an error.
    """
    texts = texts_of(texts, f"{kind}s")
    for text in texts:
        if not has_words(text):
            raise ValueError(f"the {kind} {text!r} holds no word; give one with words")
    return texts


def search(
    reader: Reader,
    paths: str | Sequence[str],
    text: str,
    top: int,
    rerank: int,
    cache: dict[str, list[float]] | None = None,
) -> Iterator[Answer]:
    """Yield the errors first, then the `top` images for a text in descending order.

    Images are ranked by cosine (`itc`). With `rerank`, that many of them are ranked by the matching
    probability (`itm`).

    Args:
        cache: features of images by path, which are reused. New features are added.

    Raises:
        ValueError: the checkpoint has no features, or the text holds no word.
    """
    paths, query = paths_of(paths), reader.blip.text_features(_with_words(text, "text"))[0]
    cache = {} if cache is None else cache
    for answer in features(reader, [path for path in paths if path not in cache]):
        if "error" in answer:
            yield answer
        else:
            cache[answer["image"]] = answer["features"]
    rows = {path: cache[path] for path in paths if path in cache}
    cosines = (torch.tensor(list(rows.values())) @ query).tolist() if rows else []
    itc = dict(zip(rows, cosines, strict=True))
    order = sorted(itc, key=lambda name: -itc[name])
    ranked: list[Answer] = [{"image": name, "itc": itc[name]} for name in order]
    if rerank:
        ranked = []
        for answer in matches(reader, order[:rerank], [text]):
            if "error" not in answer:
                ranked.append(answer | {"itc": itc[answer["image"]]})
        ranked.sort(key=lambda answer: -answer["itm"])
    for rank, answer in enumerate(ranked[:top], start=1):
        yield {"text": text, "rank": rank, **answer}
