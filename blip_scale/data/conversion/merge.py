"""Merge converted chunks into one set.

Merging drops duplicates, holds pairs out, and writes the index, the rejects and the summary.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import xxhash

from blip_scale.data.conversion.chunks import put_report, write_chunk_shards
from blip_scale.data.conversion.holdout import record_of, remove_heldout, write_heldout
from blip_scale.data.conversion.output import OutputFolder
from blip_scale.data.conversion.pairs import Reason, Reject
from blip_scale.data.conversion.repeats import repeats
from blip_scale.data.conversion.report import (
    REPORTS,
    Counts,
    Report,
    example_of,
    reject_fields,
    report_name,
)
from blip_scale.data.conversion.text_counts import text_summary
from blip_scale.data.mds import INDEX_NAME, Shard, parse_shard
from blip_scale.data.shards import CAPTIONS_KEY, ROLES_KEY, Record

SUMMARY_NAME = "summary.json"
REJECTS_NAME = "rejects.jsonl"
_OURS = re.compile(r"shard\.\d{6}(\.\d{5}\.(unique|kept))*\.\d{5}\.mds")
"""Names of the shards that a conversion writes. `unique`: rewritten without duplicates. `kept`:
rewritten without held-out pairs."""
_WRITTEN = (INDEX_NAME, REJECTS_NAME, SUMMARY_NAME)


def merge_chunks(out: OutputFolder, plan: dict[str, Any]) -> dict[str, Any]:
    """Write index.json, rejects.jsonl and summary.json for all chunks, and return the summary.

    If several pairs have the same id, the pair in the first chunk is kept. Shards with duplicates
    or held-out pairs are rewritten without them. The function may be called again at any time,
    also after a kill.

    Args:
        out: output with the chunks.
        plan: content of conversion.json.

    Raises:
        ValueError: chunks are missing, or the held-out pairs can't be chosen (`holdout.choose`).
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
        _drop(out, number, ids, plan["shard_bytes"], held_out=False)
    holdout = holdout_of(plan)
    if holdout is not None and any(report.ids for report in _reports(out, numbers)):
        # Duplicates are already dropped, so no copy of a held-out pair stays in the training set.
        chosen = write_heldout(out, numbers, holdout, plan["shard_bytes"])
        for number, ids in chosen.items():
            _drop(out, number, ids, plan["shard_bytes"], held_out=True)
    summary, shards = _write_set(out, plan, _reports(out, numbers))
    # Remove the old versions of shards that this call or a killed one has rewritten.
    out.discard(name for name in out.names() - shards if _OURS.fullmatch(name))
    return summary


def holdout_of(plan: dict[str, Any]) -> int | float | None:
    """Return the number (int) or share (float) of pairs to hold out, or None."""
    rules = plan["rules"] or {}
    holdout: int | float | None = rules.get("holdout")
    return holdout


def remove_set(out: OutputFolder) -> None:
    """Remove all files of a conversion except its plan, the index first."""
    out.discard([INDEX_NAME])
    remove_heldout(out)
    out.discard(sorted(out.names(REPORTS)))
    out.discard(n for n in sorted(out.names()) if _OURS.fullmatch(n) or n in _WRITTEN)


def _reports(out: OutputFolder, numbers: Iterable[int]) -> Iterator[Report]:
    for text in out.read_many([report_name(number) for number in numbers]):
        yield Report.from_json(text)


def _repeated_ids(out: OutputFolder, numbers: Sequence[int]) -> dict[int, list[str]]:
    """Return, by chunk, the ids that also occur in an earlier chunk.

    Memory holds only 64-bit hashes of the ids: 8 bytes per pair, plus 3 bytes for the search.
    """
    content, ends = bytearray(), []
    for report in _reports(out, numbers):
        for name in chain(report.held_out, report.ids):
            content += xxhash.xxh3_64_digest(name)
        ends.append(len(content) // 8)
    hashes = np.frombuffer(content, np.uint64)
    later, firsts = repeats(hashes)
    if not len(later):
        return {}
    chunks = np.searchsorted(ends, np.union1d(later, firsts), side="right")
    concerned = [numbers[chunk] for chunk in np.unique(chunks).tolist()]
    suspects = {repeated_hash.tobytes() for repeated_hash in hashes[later]}
    seen: set[str] = set()
    repeated: dict[int, list[str]] = defaultdict(list)
    for report in _reports(out, concerned):
        seen.update(report.held_out)
        for name in report.ids:
            if xxhash.xxh3_64_digest(name) in suspects:
                if name in seen:
                    repeated[report.number].append(name)
                seen.add(name)
    return repeated


def _drop(
    out: OutputFolder, number: int, ids: Sequence[str], shard_bytes: int, held_out: bool
) -> None:
    """Drop samples from a chunk: rewrite the shards that hold them, under new names.

    The report names the valid shards and is written last, so a kill at any moment is harmless. Ids
    that are already dropped are ignored.

    Args:
        out: output that holds the chunk.
        number: number of the chunk.
        ids: samples to drop.
        shard_bytes: largest size of a shard.
        held_out: whether the samples are in the held-out set. If not, they are duplicates.
    """
    report = Report.from_json(out.read(report_name(number)))
    dropped = set(ids) & set(report.ids)
    if not dropped:
        return
    lost_captions = 0
    lost_roles: Counter[str] = Counter()

    def records(shard: Shard) -> Iterator[Record]:
        nonlocal lost_captions
        for index in range(shard.samples):
            sample = shard.read(index)
            if sample["id"] in dropped:
                lost_captions += len(sample["captions"])
                lost_roles.update(sample.get("roles", ()))
            else:
                yield record_of(sample)

    shards, captions = [], []
    start = 0
    with out.workshop(f"{number:06}") as folder:
        for entry, counts in zip(report.shards, report.shard_captions, strict=True):
            name = entry["raw_data"]["basename"]
            inside = report.ids[start : start + entry["samples"]]
            start += entry["samples"]
            if dropped.isdisjoint(inside):
                shards.append(entry)
                captions.append(counts)
                continue
            path = out.fetch(name, folder / "fetched")
            prefix = name.removeprefix("shard.").removesuffix("mds")
            prefix += "kept" if held_out else "unique"
            kept = records(parse_shard(path.parent, entry))
            entries, kept_counts = write_chunk_shards(folder, kept, prefix, shard_bytes)
            shards += entries
            captions += kept_counts
        report.shards, report.shard_captions = shards, captions
        report.roles = dict(Counter(report.roles) - lost_roles)
        report.drop(dropped)
        count = len(dropped)
        if held_out:
            report.held_out += sorted(dropped)
            report.pairs += Counts(written=-count, held_out=count)
            report.captions += Counts(written=-lost_captions, held_out=lost_captions)
        else:
            detail = "of an earlier chunk"
            report.rejects += [Reject(name, Reason.DUPLICATE_ID, detail) for name in ids]
            report.pairs += Counts(written=-count, rejected=count)
            report.captions += Counts(written=-lost_captions, rejected=lost_captions)
        put_report(out, folder, report)


def _write_set(
    out: OutputFolder, plan: dict[str, Any], reports: Iterable[Report]
) -> tuple[dict[str, Any], set[str]]:
    """Write the files of a whole set. The index is last, so a set with an index is complete.

    Returns:
        The summary and the names of the shards.
    """
    shards: list[dict[str, Any]] = []
    shard_captions: list[list[int] | None] = []
    reasons: Counter[str] = Counter()
    tallies: Counter[str] = Counter()
    roles: Counter[str] = Counter()
    examples: dict[str, str] = {}
    pairs, captions, reencoded = Counts(), Counts(), 0
    with out.workshop("merge", per_process=True) as folder:
        with (folder / REJECTS_NAME).open("w", encoding="utf-8") as file:
            for report in reports:
                shards += report.shards
                shard_captions += report.shard_captions
                reasons += report.reasons
                tallies.update(report.tallies)
                roles.update(report.roles)
                pairs, captions = pairs + report.pairs, captions + report.captions
                reencoded += report.reencoded
                for reject in report.rejects:
                    examples.setdefault(str(reject.reason), example_of(reject))
                    file.write(json.dumps(reject_fields(reject)) + "\n")
        text = text_summary(tallies)
        summary = {
            "pairs": pairs.fields(with_held_out=holdout_of(plan) is not None),
            "captions": captions.fields(with_held_out=holdout_of(plan) is not None),
            "rejects": dict(sorted(reasons.items())),
            "reject_examples": dict(sorted(examples.items())),
            "reencoded_images": reencoded,
            "text": text,
            "shards": len(shards),
            "bytes": sum(shard["raw_data"]["bytes"] for shard in shards),
            "made_by": {key: value for key, value in plan.items() if key != "input"},
        }
        if roles:
            summary["roles"] = dict(sorted(roles.items()))
        if tallies:
            summary["tallies"] = dict(sorted(tallies.items()))
        index = {"version": 2, "shards": shards, CAPTIONS_KEY: shard_captions}
        if roles:
            index[ROLES_KEY] = summary["roles"]
        (folder / SUMMARY_NAME).write_text(json.dumps(summary, indent=2) + "\n")
        (folder / INDEX_NAME).write_text(json.dumps(index, sort_keys=True))
        out.put(folder, [REJECTS_NAME, SUMMARY_NAME, INDEX_NAME])
    return summary, {shard["raw_data"]["basename"] for shard in shards}
