"""Whether a stream can be read here: its index, and its first and last sample, decoded."""

from __future__ import annotations

import tempfile
from dataclasses import replace

from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.pixels.decoding import decode_image
from blip_scale.data.reading.stream_store import StreamStore


def probe_stream(stream: StreamRecipe, make_with: str, retry_s: float) -> str:
    """Open a stream and decode its ends; what was found, in a line. A remote is read past the
    cache, which would hide that it can't be reached.

    Args:
        retry_s: so long a remote that fails is asked again.

    Raises:
        FileNotFoundError: index or shard is not there, or may not be read.
        ValueError: a damaged index, shard or sample (CorruptSample).
    """
    with tempfile.TemporaryDirectory(prefix="blip_scale_probe_") as folder:
        if stream.remote:
            stream = replace(stream, local=folder)
        store = StreamStore(stream, make_with, retry_s=retry_s)
        last = len(store.shards) - 1
        for shard, sample in ((0, 0), (last, store.shard_samples[last] - 1)):
            decode_image(store.read(shard, sample)["image"])
    return f"{store.samples} samples in {len(store.shards)} shards, first and last decoded"
