"""Description of the streams in a run's manifest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import xxhash

from blip_scale.data.reading.stream_store import StreamStore

_CHUNK_BYTES = 1 << 22


def inventory(stores: Sequence[StreamStore]) -> list[dict[str, Any]]:
    """Describe each stream as a JSON object.

    The fields are name, local, remote, samples, shards (their number), bytes (uncompressed) and
    index_xxh64. The last is the hash of index.json, which holds the hashes of all shards, or of the
    list of tars with their sizes. Overlays of a stream are described in the same way.
    """
    return [_stream(store) for store in stores]


def _stream(store: StreamStore) -> dict[str, Any]:
    hasher = xxhash.xxh64()
    with store.index_path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            hasher.update(chunk)
    entry: dict[str, Any] = {
        "name": store.name,
        "local": str(store.folder),
        "remote": store.remote,
        "samples": store.samples,
        "shards": len(store.shards),
        "bytes": int(store.shards.raw_bytes.sum()),
        "index_xxh64": hasher.hexdigest(),
    }
    if store.overlays:
        entry["overlays"] = [_stream(overlay) for overlay in store.overlays]
    return entry
