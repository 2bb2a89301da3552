"""One shard of web pairs through captioner and filter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.captions import clean_caption
from blip_scale.data.conversion.pairs import Reason, Reject, Screened
from blip_scale.data.reading.cache import ShardCache
from blip_scale.data.reading.stream_store import CorruptSample, StreamStore
from blip_scale.data.shards import Record
from blip_scale.inference.blip import Blip, draws_of
from blip_scale.inference.images import Done, batched, done_ahead, pixels_of
from blip_scale.inference.loading import Loading, load_blip
from blip_scale.model.generation import NucleusSettings

BINS = 20
"""Of the histogram of scores."""
_CACHE_BYTES = 16 << 30
WEB, SYNTHETIC = "web", "synthetic"
_UNMATCHED = {WEB: Reason.WEB_UNMATCHED, SYNTHETIC: Reason.SYNTHETIC_UNMATCHED}


@dataclass(frozen=True)
class Settings:
    """What decides about captions and scores."""

    captioner: str
    """Checkpoint that writes: captioning or pretraining."""
    judge: str
    """Checkpoint that filters: retrieval or pretraining."""
    threshold: float = 0.5
    """Captions whose matching probability is below it are dropped (published: 0.5)."""
    sampling: NucleusSettings = field(
        default_factory=lambda: NucleusSettings(max_length=20, min_length=5)
    )
    prompt: str | None = None
    """How the captioner begins; None: as its checkpoint does."""
    seed: int = 0
    """Of the sampling, with the id of each image."""
    batch_size: int = 64
    """Images at once."""
    loading: Loading = field(default_factory=Loading)
    """Of both; device and precision are given."""
    threads: int = 4
    """Of each process, that decode images."""


@cache
def models(settings: Settings) -> tuple[Blip, Blip]:
    """Captioner and filter; one network where they are the same checkpoint."""
    if settings.loading.device == "cpu":
        torch.set_num_threads(1)  # the same bits for any number of processes and cores
    captioner = load_blip(Path(settings.captioner), settings.loading)
    captioner.require("caption")
    judge = captioner
    if settings.judge != settings.captioner:
        judge = load_blip(Path(settings.judge), settings.loading)
    judge.require("match")
    return captioner, judge


@cache
def store_of(folder: str, remote: str | None) -> StreamStore:
    """The input; `folder` is a cache where there is a remote."""
    cache = ShardCache([Path(folder)], _CACHE_BYTES) if remote else None
    return StreamStore(StreamRecipe("input", folder, remote), cache=cache)


def read_shard(
    folder: str, remote: str | None, shard: int, settings: Settings
) -> Iterator[Screened]:
    """Every sample of a shard with the captions that the filter keeps, web captions first.

    The same for any number of processes: batches are cut from the shard, and random numbers come
    from the samples' ids.
    """
    captioner, judge = models(settings)
    store = store_of(folder, remote)
    sizes = (captioner.image_size, judge.image_size)
    loaded = done_ahead(_samples(store, shard), partial(_pixels, sizes=sizes), settings.threads)
    for group in batched(loaded, settings.batch_size):
        good = [one for one in group if one.result is not None]
        judged = iter(_judge(captioner, judge, good, settings) if good else [])
        for one in group:
            if one.result is None:
                yield _unreadable(one.item, one.error)
            else:
                yield next(judged)


def _samples(store: StreamStore, shard: int) -> Iterator[dict[str, Any]]:
    for index in range(store.shard_samples[shard]):
        try:
            yield store.read(shard, index)
        except CorruptSample as error:
            yield {"id": f"{store.shard_name(shard)}[{index}]", "captions": [], "error": str(error)}


def _pixels(sample: dict[str, Any], sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """For the captioner and for the filter."""
    if "error" in sample:
        raise CorruptSample(sample["error"])
    first = pixels_of(sample["image"], sizes[0])
    same = sizes[0] == sizes[1]
    return first, first if same else pixels_of(sample["image"], sizes[1])


def _unreadable(sample: dict[str, Any], error: str) -> Screened:
    reject = Reject(sample["id"], Reason.UNDECODABLE, error)
    return Screened(sample["id"], None, [reject], len(sample["captions"]))


def _judge(
    captioner: Blip,
    judge: Blip,
    loaded: Sequence[Done[dict[str, Any], tuple[Tensor, Tensor]]],
    settings: Settings,
) -> list[Screened]:
    samples = [one.item for one in loaded]
    pixels = [one.result for one in loaded if one.result is not None]
    embeds = captioner.image_embeds(torch.stack([first for first, _ in pixels]))
    draws = draws_of(
        [sample["id"] for sample in samples], settings.seed, settings.sampling.max_length
    )
    said = captioner.captions(embeds, settings.sampling, settings.prompt, draws)
    if judge is not captioner:
        embeds = judge.image_embeds(torch.stack([second for _, second in pixels]))
    texts = [
        [*((WEB, text) for text in sample["captions"]), (SYNTHETIC, clean_caption(synthetic))]
        for sample, synthetic in zip(samples, said, strict=True)
    ]
    owners = [image for image, own in enumerate(texts) for _ in own]
    scores = iter(judge.match(embeds, [text for own in texts for _, text in own], owners).tolist())
    prints = {"captioner": captioner.fingerprint, "filter": judge.fingerprint}
    return [
        _sorted_out(sample, [(kind, text, next(scores)) for kind, text in own], settings, prints)
        for sample, own in zip(samples, texts, strict=True)
    ]


def _sorted_out(
    sample: dict[str, Any],
    scored: list[tuple[str, str, float]],
    settings: Settings,
    prints: dict[str, str],
) -> Screened:
    """The sample with the captions that reach the threshold; what is dropped is told with score
    and text."""
    captions: list[str] = []
    provenance: list[dict[str, Any]] = []
    rejects: list[Reject] = []
    tallies: dict[str, int] = {}
    for number, (kind, text, score) in enumerate(scored):
        kept = bool(text) and score >= settings.threshold
        for name in (f"{kind} {'kept' if kept else 'dropped'}", f"{kind} score {_bin(score):02}"):
            tallies[name] = tallies.get(name, 0) + 1
        if kept:
            captions.append(text)
            origin = {"kind": kind, "score": round(score, 4), "filter": prints["filter"]}
            if kind == SYNTHETIC:
                origin["captioner"] = prints["captioner"]
            provenance.append(origin)
        else:
            rejects.append(
                Reject(sample["id"], _UNMATCHED[kind], f"{score:.4f} {text}", caption=number)
            )
    fields = {key: sample[key] for key in ("source", "width", "height", "url", "similarity")}
    record = None
    if captions:
        record = Record(sample["id"], sample["image"], captions, annotations=provenance, **fields)
    return Screened(sample["id"], record, rejects, len(scored), tallies)


def _bin(score: float) -> int:
    return min(int(score * BINS), BINS - 1)
