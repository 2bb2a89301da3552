"""What a run reads, for its records: every stream with its shards and their hashes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import xxhash

from blip_scale.data.mds import INDEX_NAME
from blip_scale.data.reading.stream_store import StreamStore


def inventory(stores: Sequence[StreamStore]) -> list[dict[str, Any]]:
    """A JSON-able object a stream: name, local, remote, samples, shards (their number), bytes
    (uncompressed), index_xxh64 (of index.json), and `files`: [name, samples, bytes, hashes by
    algorithm] of every shard, as the index gives them."""
    return [_stream(store) for store in stores]


def _stream(store: StreamStore) -> dict[str, Any]:
    files = [
        [
            store.shard_name(number),
            shard.samples,
            store.shard_bytes(number),
            dict((shard.zip_data or shard.raw_data).hashes),
        ]
        for number, shard in enumerate(store.shards)
    ]
    return {
        "name": store.name,
        "local": str(store.folder),
        "remote": store.remote,
        "samples": store.samples,
        "shards": len(files),
        "bytes": sum(size for _, _, size, _ in files),
        "index_xxh64": xxhash.xxh64((store.folder / INDEX_NAME).read_bytes()).hexdigest(),
        "files": files,
    }
