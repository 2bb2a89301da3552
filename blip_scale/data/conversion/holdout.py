"""Choose held-out pairs and write them to a second set, OUT/heldout.

The second set lies inside OUT, so both share the lock, the bucket and the logic for resuming. One
copy or one `--overwrite` applies to both.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from blip_scale.data.conversion.output import OutputFolder
from blip_scale.data.conversion.report import Report, report_name
from blip_scale.data.mds import INDEX_NAME, parse_shard
from blip_scale.data.shards import Record, write_shards

HELDOUT = "heldout/"
"""Folder of the held-out set in OUT."""
_CHOSEN = f"{HELDOUT}chosen.json"
"""File with the ids of the held-out pairs, by chunk number."""
_INDEX = f"{HELDOUT}{INDEX_NAME}"
_SEED = 2201_12086
"""Fixed seed, so every machine and every conversion holds out the same pairs."""
KEYS = ("image", "second_image", "url")


def parse_holdout(text: str) -> int | float | None:
    """Parse `--holdout`: a number of pairs (int), a share such as `0.02` or `2%` (float), or "".

    An empty text gives None.

    Raises:
        ValueError: the text is neither a positive integer nor a share between 0 and 1.
    """
    if not text:
        return None
    try:
        if text.isdecimal() and int(text) > 0:
            return int(text)
        share = round(float(text.removesuffix("%")) / (100 if text.endswith("%") else 1), 12)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(
            f"--holdout {text}: expected a number of pairs (5000) or a share of them (0.02 or 2%)"
        )
    return share


def image_keys(record: Record) -> dict[str, int]:
    """Return hashes of image content and URL, to recognise records of the same image; 0 if none."""
    return {
        "image": _hash(record.image),
        "second_image": _hash(record.second_image) if record.second_image else 0,
        "url": _hash(f"url {record.url}".encode()) if record.url else 0,
    }


def choose(ids: np.ndarray, keys: Sequence[np.ndarray], holdout: int | float) -> np.ndarray:
    """Choose pairs by a hash of their ids. No image is in both the training and held-out sets.

    Pairs that share a key (content or URL of an image) form a group. A group is held out as a whole
    or not at all. Groups are visited in the order of a hash. A group is skipped if it is larger
    than the number of pairs still missing, so slightly fewer pairs than requested may be chosen.

    Args:
        ids: uint64 [pairs], hash of every id.
        keys: uint64 [pairs] each, see `image_keys`.
        holdout: number of pairs (int) or share of pairs (float).

    Returns:
        int64 [chosen], ascending indices of the chosen pairs.

    Raises:
        ValueError: no pair would be chosen, or no pair would be left to train on.
    """
    total = len(ids)
    wanted = holdout if isinstance(holdout, int) else round(holdout * total)
    if not 0 < wanted < total:
        raise ValueError(
            f"--holdout {holdout}: {wanted} of the {total} pairs would be held out; at least one "
            "must be, and at least one must be left: convert again with another --holdout and "
            "--overwrite"
        )
    group = _groups(total, keys)
    first = np.full(total, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(first, group, ids)  # smallest id hash of each group
    sizes = np.bincount(group, minlength=total)
    representatives = np.flatnonzero(sizes)
    order = representatives[np.argsort(_mixed(first[representatives]), kind="stable")]
    taken = np.zeros(total, bool)
    for representative in order.tolist():
        if sizes[representative] <= wanted:
            taken[representative] = True
            wanted -= int(sizes[representative])
            if not wanted:
                break
    chosen = np.flatnonzero(taken[group])
    if not len(chosen):
        raise ValueError(
            f"--holdout {holdout}: all pairs share so few images or URLs that none can be held out"
        )
    return chosen


def write_heldout(
    out: OutputFolder, numbers: Sequence[int], holdout: int | float, shard_bytes: int
) -> dict[int, list[str]]:
    """Write the held-out set if it does not exist yet, and return its ids by chunk.

    The chunks are not changed. The index is written last, so a set with an index is complete. A
    conversion that was killed while it removed the pairs from the chunks reads the saved choice.

    Args:
        out: output with all chunks, without duplicates.
        numbers: numbers of all chunks.
        holdout: see `choose`.
        shard_bytes: largest size of a shard.

    Raises:
        ValueError: see `choose`; or pairs were removed from chunks, but the set is missing.
    """
    if out.has(_INDEX):
        return {int(number): ids for number, ids in json.loads(out.read(_CHOSEN)).items()}
    positions = _chosen_positions(out, numbers, holdout)
    chosen: dict[int, list[str]] = {}
    with out.workshop("heldout", per_process=True) as folder:
        made = folder / HELDOUT
        write_shards(made, _records(out, positions, folder, chosen), shard_bytes)
        shards = sorted(f"{HELDOUT}{path.name}" for path in made.glob("shard.*"))
        (folder / _CHOSEN).write_text(json.dumps(chosen))
        out.put(folder, [*shards, _CHOSEN, _INDEX])
    return chosen


def remove_heldout(out: OutputFolder) -> None:
    """Remove the held-out set, its index first."""
    out.discard([_INDEX])
    names = sorted(out.names(HELDOUT))
    out.discard(name for name in names if name.startswith(f"{HELDOUT}shard.") or name == _CHOSEN)


def has_heldout(out: OutputFolder) -> bool:
    """Whether the output has a complete held-out set."""
    return out.has(_INDEX)


def _hash(content: bytes) -> int:
    return xxhash.xxh3_64_intdigest(content)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Map uint64 values to pseudo-random values with SplitMix64's finalizer."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(_SEED) * np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def _groups(total: int, keys: Sequence[np.ndarray]) -> np.ndarray:
    """Return the smallest index in each pair's group of pairs connected by keys, int64 [total].

    The Python loop visits only pairs with repeated keys.
    """
    every = np.concatenate(keys)
    owners = np.tile(np.arange(total), len(keys))[every != 0]
    every = every[every != 0]
    order = np.argsort(every, kind="stable")
    same = np.flatnonzero(every[order][1:] == every[order][:-1])
    above = np.arange(total)

    def root(index: int) -> int:
        while above[index] != index:
            above[index] = above[above[index]]
            index = int(above[index])
        return index

    left, right = owners[order[same]], owners[order[same + 1]]
    for first, second in zip(left.tolist(), right.tolist(), strict=True):
        low, high = sorted((root(first), root(second)))
        above[high] = low
    for index in np.unique(np.concatenate([left, right])).tolist():
        above[index] = root(index)
    return above


def _chosen_positions(
    out: OutputFolder, numbers: Sequence[int], holdout: int | float
) -> dict[int, list[int]]:
    """Return the positions of the chosen pairs by chunk. Needs 32 bytes per pair of the set."""
    ids, sizes = [], []
    keys: dict[str, list[np.ndarray]] = defaultdict(list)
    for text in out.read_many([report_name(number) for number in numbers]):
        report = _untouched(out, text)
        ids.append(np.array([_hash(name.encode()) for name in report.ids], np.uint64))
        sizes.append(len(report.ids))
        for key in KEYS:
            keys[key].append(np.array(report.keys.get(key, []), np.uint64))
    columns = [np.concatenate(keys[key]) for key in KEYS]
    chosen = choose(np.concatenate(ids), columns, holdout)
    starts = np.cumsum([0, *sizes])
    chunks = np.searchsorted(starts, chosen, side="right") - 1
    positions: dict[int, list[int]] = defaultdict(list)
    for chunk, index in zip(chunks.tolist(), chosen.tolist(), strict=True):
        positions[numbers[chunk]].append(index - int(starts[chunk]))
    return positions


def _untouched(out: OutputFolder, text: bytes) -> Report:
    """Parse a chunk's report, and check that the chunk still has its held-out pairs.

    Two merges may run at the same time in a bucket. The other merge may have removed the pairs
    after this one had looked for the held-out set.

    Raises:
        ValueError: held-out pairs were already removed from the chunk.
    """
    report = Report.from_json(text)
    if report.held_out:
        raise ValueError(
            f"{out.location}: held-out pairs were taken out of chunk {report.number}, but {_INDEX} "
            "was not there: run --merge when no other merge is under way; if the file was removed, "
            "convert again with --overwrite"
        )
    return report


def _records(
    out: OutputFolder,
    positions: Mapping[int, Iterable[int]],
    folder: Path,
    chosen: dict[int, list[str]],
) -> Iterator[Record]:
    """Yield the records at the given positions of chunks, and add their ids to `chosen`."""
    for number, wanted in positions.items():
        report = _untouched(out, out.read(report_name(number)))
        remaining = set(wanted)
        chosen[number] = [report.ids[position] for position in sorted(remaining)]
        start = 0
        for entry in report.shards:
            inside = [start + i for i in range(entry["samples"]) if start + i in remaining]
            if inside:
                path = out.fetch(entry["raw_data"]["basename"], folder / "fetched")
                shard = parse_shard(path.parent, entry)
                for position in inside:
                    yield record_of(shard.read(position - start))
                if out.is_remote:
                    path.unlink()
            start += entry["samples"]


def record_of(sample: dict[str, Any]) -> Record:
    """Return the record from which a sample of a shard was written."""
    return Record(caption=sample.pop("captions"), **sample)
