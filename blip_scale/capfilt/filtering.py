"""Caption and filter one shard of web pairs."""

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
"""Number of bins in the histogram of scores."""
_CACHE_BYTES = 16 << 30
WEB, SYNTHETIC = "web", "synthetic"
_UNMATCHED = {WEB: Reason.WEB_UNMATCHED, SYNTHETIC: Reason.SYNTHETIC_UNMATCHED}


@dataclass(frozen=True)
class Settings:
    """Settings that determine captions and scores."""

    captioner: str
    """Checkpoint that writes captions, for captioning or pretraining."""
    judge: str
    """Checkpoint that filters captions, for retrieval or pretraining."""
    threshold: float = 0.5
    """Lowest matching probability of a caption that is kept (published: 0.5)."""
    sampling: NucleusSettings = field(
        default_factory=lambda: NucleusSettings(max_length=20, min_length=5)
    )
    prompt: str | None = None
    """Text with which the captioner begins; None: the prompt of its checkpoint."""
    seed: int = 0
    """Seed of the sampling, combined with the id of each image."""
    batch_size: int = 64
    """Number of images processed at once."""
    loading: Loading = field(default_factory=Loading)
    """Options for loading both checkpoints; device and precision must be set."""
    threads: int = 4
    """Number of threads per process that decode images."""


@cache
def models(settings: Settings) -> tuple[Blip, Blip]:
    """Load captioner and filter; they are one network if the checkpoint is the same."""
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
    """Open the input; with a remote, `folder` is its cache."""
    cache = ShardCache([Path(folder)], _CACHE_BYTES) if remote else None
    return StreamStore(StreamRecipe("input", folder, remote), cache=cache)


def read_shard(
    folder: str, remote: str | None, shard: int, settings: Settings
) -> Iterator[Screened]:
    """Yield every sample of a shard with the captions that the filter keeps, web captions first.

    The result does not depend on the number of processes: batches are cut from the shard, and
    random numbers depend on the samples' ids.
    """
    captioner, judge = models(settings)
    store = store_of(folder, remote)
    sizes = (captioner.image_size, judge.image_size)
    loaded = done_ahead(_samples(store, shard), partial(_pixels, sizes=sizes), settings.threads)
    for group in batched(loaded, settings.batch_size):
        readable = [done for done in group if done.result is not None]
        judged = iter(_judge(captioner, judge, readable, settings) if readable else [])
        for done in group:
            if done.result is None:
                yield _unreadable(done.item, done.error)
            else:
                yield next(judged)


def _samples(store: StreamStore, shard: int) -> Iterator[dict[str, Any]]:
    for index in range(store.shard_samples[shard]):
        try:
            yield store.read(shard, index)
        except CorruptSample as error:
            yield {"id": f"{store.shard_name(shard)}[{index}]", "captions": [], "error": str(error)}


def _pixels(sample: dict[str, Any], sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Decode the image at the sizes of captioner and filter."""
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
    """Caption a batch of decoded samples, score all captions, and drop those that don't match."""
    samples = [done.item for done in loaded]
    pixels = [done.result for done in loaded if done.result is not None]
    embeds = captioner.image_embeds(torch.stack([first for first, _ in pixels]))
    draws = draws_of(
        [sample["id"] for sample in samples], settings.seed, settings.sampling.max_length
    )
    synthetic = captioner.captions(embeds, settings.sampling, settings.prompt, draws)
    if judge is not captioner:
        embeds = judge.image_embeds(torch.stack([second for _, second in pixels]))
    texts: list[str] = []
    kinds: list[str] = []
    owners: list[int] = []
    for image, (sample, caption) in enumerate(zip(samples, synthetic, strict=True)):
        texts += [*sample["captions"], clean_caption(caption)]
        kinds += [*[WEB] * len(sample["captions"]), SYNTHETIC]
        owners += [image] * (len(sample["captions"]) + 1)
    scores = judge.match(embeds, texts, owners).tolist()
    scored: list[list[tuple[str, str, float]]] = [[] for _ in samples]
    for image, kind, text, score in zip(owners, kinds, texts, scores, strict=True):
        scored[image].append((kind, text, score))
    prints = {"captioner": captioner.fingerprint, "filter": judge.fingerprint}
    screened = zip(samples, scored, strict=True)
    return [_sorted_out(sample, captions, settings, prints) for sample, captions in screened]


def _sorted_out(
    sample: dict[str, Any],
    scored: list[tuple[str, str, float]],
    settings: Settings,
    prints: dict[str, str],
) -> Screened:
    """Build the output sample from the captions that reach the threshold.

    Dropped captions become rejects with their score and text.
    """
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
