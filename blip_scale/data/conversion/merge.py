"""Converted chunks -> one set: duplicates dropped, index, rejects and summary written."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from blip_scale.data.conversion.chunks import put_report, write_chunk_shards
from blip_scale.data.conversion.output import OutputFolder
from blip_scale.data.conversion.pairs import Reason, Reject
from blip_scale.data.conversion.report import (
    REPORTS,
    Counts,
    Report,
    example_of,
    reject_fields,
    report_name,
)
from blip_scale.data.conversion.text_counts import text_summary
from blip_scale.data.mds import INDEX_NAME, parse_shard
from blip_scale.data.shards import CAPTIONS_KEY, Record

SUMMARY_NAME = "summary.json"
REJECTS_NAME = "rejects.jsonl"
_OURS = re.compile(r"shard\.\d{6}\.(unique\.)?\d{5}\.mds")  # what a conversion writes
_WRITTEN = (INDEX_NAME, REJECTS_NAME, SUMMARY_NAME)


def merge_chunks(out: OutputFolder, plan: dict[str, Any]) -> dict[str, Any]:
    """Write index.json, rejects.jsonl and summary.json over all chunks; returns the summary.

    `plan` is the content of conversion.json. Of pairs with the same id the first is kept, by the
    number of its chunk; the shards with the others are written again without them. Raises
    ValueError, naming them, where chunks are missing. May be called again at any time.
    """
    numbers = range(plan["chunks"])
    there = out.names(REPORTS)
    missing = [number for number in numbers if report_name(number) not in there]
    if missing:
        raise ValueError(
            f"{out.location}: {len(missing)} of {len(numbers)} chunks are not converted yet (the "
            f"first is number {missing[0]}): run the parts that are not finished"
        )
    for number, ids in _repeated_ids(out, numbers).items():
        _drop(out, number, ids, plan["shard_bytes"])
    summary, shards = _write_set(out, plan, _reports(out, numbers))
    # What was written again without duplicates, by this call or by one that was killed.
    out.discard(name for name in out.names() - shards if _OURS.fullmatch(name))
    return summary


def remove_set(out: OutputFolder) -> None:
    """Remove what a conversion has written, all but its plan; the index goes first."""
    out.discard([INDEX_NAME])
    out.discard(sorted(out.names(REPORTS)))
    out.discard(n for n in sorted(out.names()) if _OURS.fullmatch(n) or n in _WRITTEN)


def _reports(out: OutputFolder, numbers: Iterable[int]) -> Iterator[Report]:
    for text in out.read_many([report_name(number) for number in numbers]):
        yield Report.from_json(text)


def _repeated_ids(out: OutputFolder, numbers: Sequence[int]) -> dict[int, list[str]]:
    """Ids by chunk that an earlier chunk has too.

    Only 64-bit hashes of all ids are held in memory, twice: 16 bytes a pair.
    """
    content, counts = bytearray(), []
    for report in _reports(out, numbers):
        hashes = map(xxhash.xxh3_64_intdigest, report.ids)
        content += np.fromiter(hashes, np.uint64, len(report.ids)).tobytes()
        counts.append(len(report.ids))
    every = np.frombuffer(content, np.uint64)
    in_order = np.sort(every)
    repeated_hashes = np.unique(in_order[1:][in_order[1:] == in_order[:-1]])
    del in_order
    if not len(repeated_hashes):
        return {}
    concerned = []
    for number, end, count in zip(numbers, np.cumsum(counts).tolist(), counts, strict=True):
        if np.isin(every[end - count : end], repeated_hashes).any():
            concerned.append(number)
    suspects = set(repeated_hashes.tolist())
    seen: set[str] = set()
    repeated: dict[int, list[str]] = defaultdict(list)
    for report in _reports(out, concerned):
        for one in report.ids:
            if xxhash.xxh3_64_intdigest(one) in suspects:
                if one in seen:
                    repeated[report.number].append(one)
                seen.add(one)
    return repeated


def _drop(out: OutputFolder, number: int, ids: list[str], shard_bytes: int) -> None:
    """Write the shards of a chunk again without some of its samples, under other names.

    The report is what says which shards count, so a kill at any moment does no harm.
    """
    report = Report.from_json(out.read(report_name(number)))
    dropped = set(ids)
    lost_captions = 0

    def records(folder: Path) -> Iterator[Record]:
        nonlocal lost_captions
        for entry in report.shards:
            path = out.fetch(entry["raw_data"]["basename"], folder / "fetched")
            shard = parse_shard(path.parent, entry)
            for index in range(shard.samples):
                sample = shard.read(index)
                if sample["id"] in dropped:
                    lost_captions += len(sample["captions"])
                else:
                    yield Record(caption=sample.pop("captions"), **sample)

    with out.workshop(f"{number:06}") as folder:
        # The old shards' entries are read while the new ones are written.
        write_chunk_shards(report, folder, records(folder), f"{number:06}.unique", shard_bytes)
        report.ids = [one for one in report.ids if one not in dropped]
        report.rejects += [Reject(one, Reason.DUPLICATE_ID, "of an earlier chunk") for one in ids]
        report.pairs += Counts(0, -len(ids), len(ids))
        report.captions += Counts(0, -lost_captions, lost_captions)
        put_report(out, folder, report)


def _write_set(
    out: OutputFolder, plan: dict[str, Any], reports: Iterable[Report]
) -> tuple[dict[str, Any], set[str]]:
    """The index comes last: where it is, the set is whole. Returns the summary and the names of the
    shards."""
    shards: list[dict[str, Any]] = []
    shard_captions: list[list[int] | None] = []
    reasons: Counter[str] = Counter()
    tallies: Counter[str] = Counter()
    examples: dict[str, str] = {}
    pairs, captions, reencoded = Counts(), Counts(), 0
    with out.workshop("merge", own=True) as folder:
        with (folder / REJECTS_NAME).open("w", encoding="utf-8") as file:
            for report in reports:
                shards += report.shards
                shard_captions += report.shard_captions
                reasons += report.reasons
                tallies.update(report.tallies)
                pairs, captions = pairs + report.pairs, captions + report.captions
                reencoded += report.reencoded
                for reject in report.rejects:
                    examples.setdefault(str(reject.reason), example_of(reject))
                    file.write(json.dumps(reject_fields(reject)) + "\n")
        text = text_summary(tallies)
        summary = {
            "pairs": asdict(pairs),
            "captions": asdict(captions),
            "rejects": dict(sorted(reasons.items())),
            "reject_examples": dict(sorted(examples.items())),
            "reencoded_images": reencoded,
            "text": text,
            "shards": len(shards),
            "bytes": sum(shard["raw_data"]["bytes"] for shard in shards),
            "made_by": {key: value for key, value in plan.items() if key != "input"},
        }
        if tallies:
            summary["tallies"] = dict(sorted(tallies.items()))
        index = {"version": 2, "shards": shards, CAPTIONS_KEY: shard_captions}
        (folder / SUMMARY_NAME).write_text(json.dumps(summary, indent=2) + "\n")
        (folder / INDEX_NAME).write_text(json.dumps(index, sort_keys=True))
        out.put(folder, [REJECTS_NAME, SUMMARY_NAME, INDEX_NAME])
    return summary, {shard["raw_data"]["basename"] for shard in shards}
