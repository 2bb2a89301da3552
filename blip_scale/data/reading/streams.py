"""Open the stores of streams."""

from __future__ import annotations

import os
from pathlib import Path

from blip_scale.config.recipe import DataRecipe, StreamRecipe
from blip_scale.data.reading.cache import ShardCache
from blip_scale.data.reading.stream_store import StreamStore
from blip_scale.data.reading.tar_store import TarStore
from blip_scale.storage.free_space import parse_bytes

STORES: dict[str, type[StreamStore]] = {"mds": StreamStore, "tars": TarStore}
"""Value of a stream's `format` -> class of its store."""


def open_stream(
    stream: StreamRecipe,
    make_with: str = "",
    cache: ShardCache | None = None,
    retry_s: float = DataRecipe.retry_s,
) -> StreamStore:
    """Open the store of a stream. It raises the errors of `StreamStore`."""
    return STORES[stream.format](stream, make_with, cache, retry_s)


def open_streams(data: DataRecipe) -> list[StreamStore]:
    """Open the stores of all training streams, with one cache limit for all."""
    if not data.streams:
        raise ValueError("data.streams is empty: name at least one stream to train on")
    names = [stream.name for stream in data.streams]
    if len(set(names)) < len(names):
        raise ValueError(f"data.streams: names must differ, got {names}")
    folders = [
        Path(os.path.expandvars(stream.local)).expanduser()
        for stream in data.streams
        if stream.remote
    ]
    limit_bytes = parse_bytes(data.cache_limit) if data.cache_limit else None
    cache = ShardCache(folders, limit_bytes)
    return [open_stream(stream, data.make_with, cache, data.retry_s) for stream in data.streams]
