"""Caption and filter one shard of web pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip_scale.capfilt.answers import Answer, Answers
from blip_scale.capfilt.endpoint import Endpoint
from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.captions import DEFAULT_ROLE, clean_caption
from blip_scale.data.conversion.pairs import Reason, Reject, Screened
from blip_scale.data.reading.cache import ShardCache
from blip_scale.data.reading.stream_store import CorruptSample, StreamStore
from blip_scale.data.shards import Record, roles_of
from blip_scale.inference.blip import Blip, draws_of
from blip_scale.inference.images import Done, batched, done_ahead, pixels_of
from blip_scale.inference.loading import Loading, load_blip
from blip_scale.model.generation import NucleusSettings

BINS = 20
"""Number of bins in the histogram of scores."""
_CACHE_BYTES = 16 << 30
_SMALLEST = 16
"""Side in pixels of images decoded for a captioner or filter that is not a checkpoint."""
WEB, SYNTHETIC = "web", "synthetic"
_UNMATCHED = {WEB: Reason.WEB_UNMATCHED, SYNTHETIC: Reason.SYNTHETIC_UNMATCHED}


_Models = tuple[Blip | None, Blip | None]
WriteCaptions = Callable[[Sequence[dict[str, Any]], Tensor], tuple[list[Answer], Tensor | None]]
"""Function that maps samples and their pixels [B, 3, H, W] to captions, and to the captioner's
image embeddings if the captioner is a checkpoint."""


class _Text(NamedTuple):
    """A caption to be scored."""

    image: int
    """Index of its image in the batch."""
    kind: str
    role: str
    text: str


@dataclass(frozen=True)
class Settings:
    """Settings that determine captions and scores."""

    captioner: str
    """Captioning or pretraining checkpoint that writes captions; "" if `endpoint` is set."""
    judge: str
    """Retrieval or pretraining checkpoint that filters captions. With `endpoint`, "" keeps all
    captions."""
    threshold: float = 0.5
    """Lowest matching probability at which a caption is kept (published: 0.5)."""
    sampling: NucleusSettings = field(
        default_factory=lambda: NucleusSettings(max_length=20, min_length=5)
    )
    prompt: str | None = None
    """Prompt of the captioner; None uses the prompt of its checkpoint."""
    seed: int = 0
    """Seed of the sampling, combined with the id of each image."""
    batch_size: int = 64
    """Number of images processed at once."""
    loading: Loading = field(default_factory=Loading)
    """Options for loading both checkpoints; device and precision must be set."""
    threads: int = 4
    """Number of threads per process that decode images."""
    endpoint: Endpoint | None = None
    """External captioner."""
    answers: str = ""
    """Folder in which the captions of an external captioner are saved."""
    without_images: bool = False
    """Write an overlay, which holds captions but no images."""
    role: str = SYNTHETIC
    """Role of synthetic captions."""


def models(settings: Settings) -> _Models:
    """Load captioner and filter; one network serves as both if the checkpoint is the same.

    The captioner is None if it is external. The filter is None if there is none.
    """
    return _models(settings.captioner, settings.judge, settings.loading)


@cache
def _models(captioner_path: str, judge_path: str, loading: Loading) -> _Models:
    if loading.device == "cpu":
        torch.set_num_threads(1)  # bit-identical for any number of processes
    captioner = None
    if captioner_path:
        captioner = load_blip(Path(captioner_path), loading)
        captioner.require("caption")
    judge = captioner
    if judge_path != captioner_path:
        judge = load_blip(Path(judge_path), loading) if judge_path else None
    if judge is not None:
        judge.require("match")
    return captioner, judge


@cache
def store_of(folder: str, remote: str | None) -> StreamStore:
    """Open the input. `folder` is the cache of `remote`, or the set itself if that is None."""
    cache = ShardCache([Path(folder)], _CACHE_BYTES) if remote else None
    return StreamStore(StreamRecipe("input", folder, remote), cache=cache)


def read_shard(
    folder: str, remote: str | None, shard: int, settings: Settings
) -> Iterator[Screened]:
    """Yield every sample of a shard with the captions that the filter keeps, web captions first.

    The result does not depend on the number of processes: a batch never crosses shards, and random
    numbers depend on the ids of the samples.
    """
    captioner, judge = models(settings)
    store = store_of(folder, remote)
    sizes = [model.image_size if model else _SMALLEST for model in (captioner, judge)]
    decode = partial(_pixels, sizes=(sizes[0], sizes[1]))
    loaded = done_ahead(_samples(store, shard), decode, settings.threads)
    with _captions_of(captioner, settings, shard) as write_captions:
        for group in batched(loaded, settings.batch_size):
            readable = [done for done in group if done.result is not None]
            judged = iter(
                _judge(write_captions, (captioner, judge), readable, settings) if readable else []
            )
            for done in group:
                if done.result is None:
                    yield _unreadable(done.item, done.error)
                else:
                    yield next(judged)


def _samples(store: StreamStore, shard: int) -> Iterator[dict[str, Any]]:
    for index in range(store.shard_samples[shard]):
        try:
            yield store.read(shard, index) | {"place": index}
        except CorruptSample as error:
            yield {"id": f"{store.shard_name(shard)}[{index}]", "captions": [], "error": str(error)}


def _pixels(sample: dict[str, Any], sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Decode the image at the sizes of captioner and filter."""
    if "error" in sample:
        raise CorruptSample(sample["error"])
    first = pixels_of(sample["image"], sizes[0])
    same = sizes[0] == sizes[1]
    return first, first if same else pixels_of(sample["image"], sizes[1])


@contextmanager
def _captions_of(captioner: Blip | None, settings: Settings, shard: int) -> Iterator[WriteCaptions]:
    """Yield a function that captions a batch of decoded images of a shard."""
    if captioner is None:
        assert settings.endpoint is not None
        file = Path(settings.answers) / f"{shard:06}.jsonl"
        with Answers(settings.endpoint, file, settings.seed) as answers:
            yield lambda samples, pixels: (answers.of(samples), None)
        return
    model = captioner

    def write(
        samples: Sequence[dict[str, Any]], pixels: Tensor
    ) -> tuple[list[Answer], Tensor | None]:
        embeds = model.image_embeds(pixels)
        draws = draws_of(
            [sample["id"] for sample in samples], settings.seed, settings.sampling.max_length
        )
        written = model.captions(embeds, settings.sampling, settings.prompt, draws)
        return [Answer(clean_caption(caption)) for caption in written], embeds

    yield write


def _unreadable(sample: dict[str, Any], error: str) -> Screened:
    reject = Reject(sample["id"], Reason.UNDECODABLE, error)
    return Screened(sample["id"], None, [reject], len(sample["captions"]))


def _judge(
    write_captions: WriteCaptions,
    models: _Models,
    loaded: Sequence[Done[dict[str, Any], tuple[Tensor, Tensor]]],
    settings: Settings,
) -> list[Screened]:
    """Caption a batch of decoded samples, score all captions, and drop those that don't match."""
    samples = [done.item for done in loaded]
    pixels = [done.result for done in loaded if done.result is not None]
    answers, embeds = write_captions(samples, torch.stack([first for first, _ in pixels]))
    texts: list[_Text] = []
    for image, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        for text, role in zip(sample["captions"], roles_of(sample), strict=True):
            texts.append(_Text(image, WEB, role, text))
        if not answer.problem:
            texts.append(_Text(image, SYNTHETIC, settings.role, answer.caption))
    captioner, judge = models
    scores: list[float | None] = [None] * len(texts)
    if judge is not None:
        if judge is not captioner or embeds is None:
            embeds = judge.image_embeds(torch.stack([second for _, second in pixels]))
        cleaned = [clean_caption(text.text, len(text.text) + 1) for text in texts]
        scores = judge.match(embeds, cleaned, [text.image for text in texts]).tolist()
    scored: list[list[tuple[_Text, float | None]]] = [[] for _ in samples]
    for text, score in zip(texts, scores, strict=True):
        scored[text.image].append((text, score))
    prints = {} if judge is None else {"filter": judge.fingerprint}
    if settings.endpoint is not None:
        prints["captioner"] = settings.endpoint.model
    elif captioner is not None:
        prints["captioner"] = captioner.fingerprint
    screened = zip(samples, answers, scored, strict=True)
    return [_sorted_out(*triple, settings, prints) for triple in screened]


def _sorted_out(
    sample: dict[str, Any],
    answer: Answer,
    scored: list[tuple[_Text, float | None]],
    settings: Settings,
    prints: dict[str, str],
) -> Screened:
    """Build the output sample from the captions that reach the threshold.

    Dropped captions become rejects with their score and text.
    """
    kept: list[_Text] = []
    provenance: list[dict[str, Any]] = []
    rejects: list[Reject] = []
    tallies: dict[str, int] = {}
    for number, (text, score) in enumerate(scored):
        is_kept = bool(text.text) and (score is None or score >= settings.threshold)
        names = [f"{text.kind} {'kept' if is_kept else 'dropped'}"]
        if score is not None:
            names.append(f"{text.kind} score {_bin(score):02}")
        for name in names:
            tallies[name] = tallies.get(name, 0) + 1
        if is_kept:
            kept.append(text)
            provenance.append(_origin(text.kind, score, prints))
        else:
            detail = text.text if score is None else f"{score:.4f} {text.text}"
            rejects.append(Reject(sample["id"], _UNMATCHED[text.kind], detail, caption=number))
    if answer.problem:
        rejects.append(Reject(sample["id"], Reason.NO_ANSWER, answer.problem, caption=len(scored)))
    record = _record(sample, kept, provenance, settings) if kept else None
    captions = len(scored) + bool(answer.problem)
    return Screened(sample["id"], record, rejects, captions, tallies)


def _origin(kind: str, score: float | None, prints: dict[str, str]) -> dict[str, Any]:
    """Annotation of a kept caption."""
    origin: dict[str, Any] = {"kind": kind}
    if score is not None:
        origin |= {"score": round(score, 4), "filter": prints["filter"]}
    if kind == SYNTHETIC:
        origin["captioner"] = prints["captioner"]
    return origin


def _record(
    sample: dict[str, Any], kept: list[_Text], provenance: list[dict[str, Any]], settings: Settings
) -> Record:
    """Build the output sample. Without images, its uid is the index of the image in its shard."""
    fields = {key: sample[key] for key in ("source", "width", "height", "url", "similarity")}
    captions = [text.text for text in kept]
    if settings.without_images:
        roles = [text.role if text.kind == SYNTHETIC else _kept_role(text.role) for text in kept]
        fields |= {"width": 1, "height": 1, "roles": roles, "uid": str(sample["place"])}
        return Record(sample["id"], b"", captions, annotations=provenance, **fields)
    if "roles" in sample:
        fields["roles"] = [text.role for text in kept]
    fields |= {key: sample[key] for key in ("uid", "sha256") if key in sample}
    return Record(sample["id"], sample["image"], captions, annotations=provenance, **fields)


def _kept_role(role: str) -> str:
    """Role in an overlay of the web captions that the filter keeps."""
    return WEB if role == DEFAULT_ROLE else f"{WEB}_{role}"


def _bin(score: float) -> int:
    return min(int(score * BINS), BINS - 1)
