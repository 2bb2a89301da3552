"""Build micro-batches in the loader workers.

Legend: B pairs of a micro-batch on one rank, T packed tokens, H and W the sides of the image.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from blip_scale.data.captions import Clean, clean_caption, is_long, whole_sentences
from blip_scale.data.loading.caption_mixture import CaptionMixture
from blip_scale.data.loading.course import Course
from blip_scale.data.loading.image_sizes import SizeSchedule
from blip_scale.data.loading.order import SampleOrder, Slot
from blip_scale.data.pixels.image_pairs import maybe_swap
from blip_scale.data.pixels.transforms import TrainTransform
from blip_scale.data.reading.prefetch import Prefetcher
from blip_scale.data.reading.stream_store import CorruptSample, DamagedShard, StreamStore
from blip_scale.data.shards import IMAGE_COLUMNS, roles_of
from blip_scale.data.tokenizer import Padding, pack_captions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SWAP = 1  # makes these random numbers independent of those for the pixels
_DAMAGED_SHARDS = 8  # number in a row that stops the run


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    images: Tensor
    """[B, 3, H, W] uint8, not normalised; [B, 2, 3, H, W] if captions describe two images."""
    token_ids: Tensor
    """[T] int64: [CLS] caption [SEP] of every pair, packed."""
    offsets: Tensor
    """[B+1] int32 into token_ids; [B + fillers + 1] with padding."""
    max_length: int
    """Tokens of the longest caption; `CaptionInput.max_tokens` with padding."""
    ids: list[str]
    captions: list[str]
    """Cleaned captions."""
    sources: list[str]
    streams: list[str]
    """Name of the stream of each pair."""
    skipped: list[str]
    """Place, id and reason of each corrupt sample that was replaced by another one."""
    roles: list[str] = field(default_factory=list)
    """Role of each caption."""
    lacking: int = 0
    """Number of samples that lack a caption role of their stream's mixture."""
    cut: int = 0
    """Number of captions that were truncated."""
    annotations: list[dict[str, Any]] = field(default_factory=list)
    """Annotation of each caption; empty if the set has none."""
    padding: Padding = field(default_factory=Padding)
    """Filler sequences that pad the captions to a static size."""

    @property
    def caption_tokens(self) -> int:
        """Number of tokens of the captions, without fillers; reads `offsets`."""
        return int(self.offsets[-1 - self.padding.fillers])

    def to(self, device: torch.device | str) -> Batch:
        """Copy to `device`. The copy is asynchronous if the tensors are in pinned memory."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            token_ids=self.token_ids.to(device, non_blocking=True),
            offsets=self.offsets.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """Copy to pinned memory; torch's DataLoader calls this method."""
        return replace(
            self,
            images=self.images.pin_memory(),
            token_ids=self.token_ids.pin_memory(),
            offsets=self.offsets.pin_memory(),
        )


@dataclass(frozen=True)
class CaptionInput:
    """Settings that turn captions into tokens."""

    tokenizer: PreTrainedTokenizerFast
    max_tokens: int
    """Maximum tokens of a caption, including [CLS] and [SEP]; longer ones are truncated."""
    max_words: int = 30
    clean: Clean = clean_caption
    prompt: str = ""
    """Text in front of every caption."""
    pad_tokens_to: int = 1
    """Number of tokens of a micro-batch is padded to a multiple of this with filler sequences."""
    whole_sentences: bool = False
    """Truncate captions at the end of a sentence, if the first sentence fits."""

    def fitted(self, caption: str) -> str:
        """Clean a caption, truncated to `max_words` or whole sentences, not to `max_tokens`."""
        if not self.whole_sentences:
            return self.clean(caption, self.max_words)
        sentences = whole_sentences(caption, self._fits)
        return sentences or self.clean(caption, self.max_words)

    def tokens(self, cleaned: str) -> int:
        """Number of tokens of a cleaned caption with the prompt, including [CLS] and [SEP]."""
        return len(self.tokenizer(self.prompt + cleaned)["input_ids"])

    def is_cut(self, caption: str, cleaned: str, tokens: int) -> bool:
        """Return True if words or tokens of a caption were dropped.

        Args:
            caption: the caption in the shard.
            cleaned: result of `fitted`.
            tokens: number of its tokens in the batch, at most `max_tokens`.
        """
        if self.whole_sentences:
            is_short = len(cleaned) < len(self.clean(caption, len(caption) + 1))
        else:
            is_short = is_long(caption, self.max_words)
        return is_short or (tokens == self.max_tokens and self.tokens(cleaned) > tokens)

    def _fits(self, cleaned: str) -> bool:
        too_many_words = len(cleaned.split(" ")) > self.max_words
        return not too_many_words and self.tokens(cleaned) <= self.max_tokens


@dataclass(frozen=True)
class LoaderPosition:
    """Rank and batch sizes, which determine this rank's part of every global batch."""

    rank: int
    world_size: int
    micro_batch_size: int
    """Pairs per micro-batch on one rank."""
    global_batch_size: int
    """Pairs per optimizer step, over all ranks and accumulation micro-steps."""

    def __post_init__(self) -> None:
        if self.global_batch_size % self.micro_samples:
            raise ValueError(
                f"train.global_batch_size {self.global_batch_size} is not a multiple of "
                f"{self.world_size} ranks x micro-batch {self.micro_batch_size}: change one of them"
            )

    @property
    def micro_samples(self) -> int:
        """Pairs per micro-step, over all ranks."""
        return self.world_size * self.micro_batch_size


@dataclass
class MicroBatches(Dataset["Batch | Exception"]):
    """Dataset of the micro-batches of one rank, by number. It runs in the loader workers."""

    stores: list[StreamStore]
    order: SampleOrder
    prefetcher: Prefetcher
    transform: TrainTransform
    sizes: SizeSchedule
    text: CaptionInput
    position: LoaderPosition
    course: Course
    seed: int
    mixtures: dict[str, CaptionMixture]
    """Caption mixture of each stream that has one, by name. Other streams use all captions of a
    sample in turn."""

    def __post_init__(self) -> None:
        self.former: MicroBatches | None = None
        """Micro-batches of the rest of the epoch in which the mixture was changed last."""

    def __getitem__(self, number: int) -> Batch | Exception:
        """Build micro-batch `number`, counted from the beginning of the course.

        An error is returned, not raised, because torch would wrap it in a long traceback.
        """
        position = self.position
        begin = number * position.micro_samples + position.rank * position.micro_batch_size
        is_former, epoch, place = self.course.locate(self.course.seen + begin)
        batches = self.former if is_former and self.former is not None else self
        try:
            return batches._batch(epoch, place)
        except (OSError, ValueError) as error:
            return error

    def _batch(self, epoch: int, begin: int) -> Batch:
        self.prefetcher.advance(epoch, begin)
        transform = replace(self.transform, size=self.sizes.at(epoch, begin))
        samples: list[dict[str, Any]] = []
        captions: list[str] = []
        streams: list[str] = []
        images: list[Tensor] = []
        annotations: list[dict[str, Any]] = []
        skipped: list[str] = []
        roles: list[str] = []
        raw: list[str] = []
        lacking = 0
        for place in range(begin, begin + self.position.micro_batch_size):
            slot = self.order.locate(epoch, place)
            store = self.stores[slot.stream]
            index, caption = store.locate(slot.shard, slot.sample)
            slot = slot._replace(sample=index)
            sample, image = read_or_replace(
                store, slot, partial(self._pixels, transform, epoch, place), skipped
            )
            samples.append(sample)
            streams.append(store.name)
            sample_roles = roles_of(sample)
            mixture = self.mixtures.get(store.name)
            if mixture is not None:
                caption = mixture.draw(sample_roles, slot.shard, slot.sample, slot.passing)
                lacking += mixture.is_lacking(sample_roles)
            elif caption is None:
                caption = self._due_caption(sample, slot)
            caption %= len(sample["captions"])  # a replacement may have fewer captions
            roles.append(sample_roles[caption])
            raw.append(sample["captions"][caption])
            words = self.text.fitted(raw[-1])
            if "annotations" in sample:
                annotations.append(sample["annotations"][caption])
            if "second_image" in sample:
                image, words = maybe_swap(image, words, self._rng(epoch, place, _SWAP))
            captions.append(words)
            images.append(image)
        prompted = [self.text.prompt + caption for caption in captions]
        text = self.text
        packed = pack_captions(text.tokenizer, prompted, text.max_tokens, text.pad_tokens_to)
        return Batch(
            images=torch.stack(images),
            token_ids=packed.token_ids,
            offsets=packed.offsets,
            max_length=packed.max_length,
            ids=[sample["id"] for sample in samples],
            captions=captions,
            sources=[sample["source"] for sample in samples],
            streams=streams,
            skipped=skipped,
            roles=roles,
            lacking=lacking,
            cut=self._cut(raw, captions, packed.offsets),
            annotations=annotations,
            padding=packed.padding,
        )

    def _cut(self, raw: list[str], captions: list[str], offsets: Tensor) -> int:
        """Count the captions that were truncated."""
        lengths = offsets.diff().tolist()  # captions first, then fillers
        triples = zip(raw, captions, lengths, strict=False)
        return sum(self.text.is_cut(*triple) for triple in triples)

    def _pixels(
        self, transform: TrainTransform, epoch: int, place: int, sample: dict[str, Any]
    ) -> Tensor:
        rng = self._rng(epoch, place)
        images = [transform(sample[name], rng) for name in IMAGE_COLUMNS if name in sample]
        return images[0] if len(images) == 1 else torch.stack(images)

    def _rng(self, epoch: int, place: int, *use: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, epoch, place, *use))

    def _due_caption(self, sample: dict[str, Any], slot: Slot) -> int:
        """Index of the caption, modulo their number: random in the first pass, then in turn."""
        return zlib.crc32(f"{self.seed}/{sample['id']}".encode()) + slot.passing


def read_or_replace(
    store: StreamStore, slot: Slot, decode: Callable[[dict[str, Any]], Tensor], skipped: list[str]
) -> tuple[dict[str, Any], Tensor]:
    """Read the sample at `slot` and decode its images.

    A corrupt sample is replaced by the next intact one of its shard. A shard that is damaged or has
    no intact sample is replaced by the next shard. What was skipped is appended to `skipped`.

    Returns:
        the columns of the sample and the result of `decode`.

    Raises:
        ValueError: `_DAMAGED_SHARDS` shards in a row have no intact sample.
    """
    shard = slot.shard
    for _ in range(_DAMAGED_SHARDS):
        while not store.shard_samples[shard]:
            shard = (shard + 1) % len(store.shard_samples)
        try:
            return _read_from(store, shard, slot.sample, decode, skipped)
        except DamagedShard as error:
            skipped.append(str(error))
            shard = (shard + 1) % len(store.shard_samples)
            if shard == slot.shard:
                break
    raise ValueError(
        f"stream {store.name!r}: too many damaged shards in a row, last {skipped[-1]}; make the "
        "set again"
    )


def _read_from(
    store: StreamStore,
    shard: int,
    sample: int,
    decode: Callable[[dict[str, Any]], Tensor],
    skipped: list[str],
) -> tuple[dict[str, Any], Tensor]:
    count = int(store.shard_samples[shard])
    corrupt: list[str] = []
    for step in range(count):
        index = (sample + step) % count
        name = ""
        try:
            columns = store.read(shard, index)
            name = f" {columns['id']}"
            pixels = decode(columns)
            skipped.extend(corrupt)
            return columns, pixels
        except DamagedShard:
            raise
        except CorruptSample as error:
            place = f"{store.name}/{store.shard_name(shard)}[{index}]"
            corrupt.append(f"{place}{name}: {error}")
    raise store.give_up(shard, min(corrupt))
