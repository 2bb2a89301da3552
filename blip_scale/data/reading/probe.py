"""Check that a stream can be read: its index, and its first and last sample."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING

from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.captions import clean_caption
from blip_scale.data.pixels.decoding import decode_image
from blip_scale.data.reading.stream_store import StreamStore
from blip_scale.data.reading.streams import open_stream
from blip_scale.data.tokenizer import count_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_CAPTIONS = 64


def unknown_share(store: StreamStore, tokenizer: PreTrainedTokenizerFast) -> float:
    """Share of unknown tokens in the first captions of the first shard.

    It is 0 if the first attempt to fetch the shard fails. The reader reports the error later.
    """
    tokens = unknown = 0
    if store.remote is None or (store.prefetch(0) and store.is_cached(0)):
        for index in range(min(_CAPTIONS, store.shard_samples[0])):
            try:
                captions = store.read(0, index)["captions"]
            except (OSError, ValueError):
                continue
            for caption in captions:
                counts = count_tokens(tokenizer, clean_caption(caption))
                tokens, unknown = tokens + counts[0] - 2, unknown + counts[1]
    return unknown / max(1, tokens)


def probe_stream(
    stream: StreamRecipe, make_with: str, retry_s: float, tokenizer: PreTrainedTokenizerFast | None
) -> tuple[str, float]:
    """Open a stream and decode its first and last sample.

    A remote is read without the cache, which could hide that it is unreachable.

    Args:
        retry_s: seconds for which a failing remote is retried.
        tokenizer: tokenizer for the captions; None skips the count of unknown tokens.

    Returns:
        a line that describes the stream, and the share of unknown tokens.

    Raises:
        FileNotFoundError: index or shard is missing, or access is denied.
        ValueError: the index, a shard or a sample (CorruptSample) is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="blip_scale_probe_") as folder:
        if stream.remote:
            stream = replace(stream, local=folder)
        store = open_stream(stream, make_with, retry_s=retry_s)
        last = len(store.shards) - 1
        for shard, sample in ((0, 0), (last, store.shard_samples[last] - 1)):
            decode_image(store.read(shard, sample)["image"])
        unknown = 0.0 if tokenizer is None else unknown_share(store, tokenizer)
    return f"{store.samples} samples in {len(store.shards)} shards, first and last decoded", unknown
