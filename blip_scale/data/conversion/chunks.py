"""Convert one chunk of the input to shards and a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from blip_scale.data.conversion.holdout import image_keys
from blip_scale.data.conversion.output import OutputFolder
from blip_scale.data.conversion.pairs import (
    Chunk,
    Found,
    RawPair,
    Reason,
    Reject,
    Screened,
    Unused,
)
from blip_scale.data.conversion.report import REPORTS, Counts, Report, report_name
from blip_scale.data.conversion.screening import Rules, screen
from blip_scale.data.conversion.text_counts import count_text
from blip_scale.data.pixels.decoding import describe
from blip_scale.data.shards import Record, captions_by_shard, shard_writer

Tick = Callable[[int, int], None]
"""tick(read, rejected): report the numbers of pairs since the last call."""
_TICK_EVERY = 50


def convert_chunk(
    number: int,
    chunk: Chunk,
    out: OutputFolder,
    rules: Rules | None,
    shard_bytes: int,
    tick: Tick,
    tokenizer: str = "",
) -> Report:
    """Read a chunk, screen its pairs, and write its shards and then its report to `out`.

    The output is deterministic: the same chunk gives the same bytes.

    Args:
        number: number of the chunk; it names the shards.
        chunk: the input.
        out: output of the conversion.
        rules: rules for screening; None if the chunk's reader screens the pairs.
        shard_bytes: largest size of a shard.
        tick: called with the progress.
        tokenizer: tokenizer that counts tokens for the report; "" to count no tokens.

    Raises:
        OSError: the disk is full or a file can't be read. `out` keeps no part of the chunk.
    """
    report = Report(number, chunk.name)

    def records() -> Iterable[Record]:
        seen: set[str] = set()
        done = Counts()
        for item in chunk.read() if rules is None else read_safely(chunk):
            record = _take(item, rules, report, seen, tokenizer)
            if record is not None:
                report.ids.append(record.id)
                if rules is not None and rules.holdout is not None:
                    for key, value in image_keys(record).items():
                        report.keys.setdefault(key, []).append(value)
                yield record
            if report.pairs.read % _TICK_EVERY == 0:
                tick(report.pairs.read - done.read, report.pairs.rejected - done.rejected)
                done = Counts(report.pairs.read, 0, report.pairs.rejected)
        tick(report.pairs.read - done.read, report.pairs.rejected - done.rejected)

    with out.workshop(f"{number:06}") as folder:
        written = write_chunk_shards(folder, records(), f"{number:06}", shard_bytes)
        report.shards, report.shard_captions = written
        put_report(out, folder, report)
    return report


def _take(
    item: Found, rules: Rules | None, report: Report, seen: set[str], tokenizer: str
) -> Record | None:
    """Screen one pair and count the pair and its captions as written or rejected."""
    if isinstance(item, Unused):
        _add(report, {item.kind: item.count})
        return None
    report.pairs.read += 1
    if isinstance(item, Reject):
        report.pairs.rejected += 1
        report.captions.read += item.captions
        report.captions.rejected += item.captions
        report.rejects.append(item)
        return None
    captions = _caption_count(item)
    report.captions.read += captions
    if item.id in seen:
        record, rejects, reencoded = None, [Reject(item.id, Reason.DUPLICATE_ID)], False
    elif isinstance(item, Screened):
        record, rejects, reencoded = item.record, item.rejects, False
        _add(report, item.tallies)
    else:
        assert rules is not None
        record, rejects, reencoded = screen(item, rules)
        if record is not None:
            _add(report, count_text(item, record, rules.word_limit, tokenizer))
    report.rejects += rejects
    if record is None:
        report.pairs.rejected += 1
        report.captions.rejected += captions
        return None
    seen.add(item.id)
    report.pairs.written += 1
    report.captions.written += len(record.captions)
    report.captions.rejected += len(rejects)
    report.roles = dict(Counter(report.roles) + Counter(record.roles or ()))
    report.reencoded += reencoded
    return record


def read_safely(chunk: Chunk) -> Iterator[Found]:
    """Yield the items of a chunk. If its reader fails, end with a reject that names the record.

    Raises:
        OSError: the disk or the network failed, so no record is at fault.
    """
    count = 0
    try:
        for item in chunk.read():
            yield item
            count += 1
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged input can raise any type of exception
        place = f"{chunk.name}, after {count} records"
        detail = f"{describe(error)}; what follows in it is not read"
        yield Reject(place, Reason.DAMAGED_INPUT, detail)


def _add(report: Report, tallies: Mapping[str, int]) -> None:
    report.tallies = dict(Counter(report.tallies) + Counter(tallies))


def _caption_count(pair: RawPair | Screened) -> int:
    if isinstance(pair, Screened):
        return pair.captions
    if isinstance(pair.captions, list):
        return len(pair.captions)
    return int(pair.captions is not None)


def write_chunk_shards(
    folder: Path, records: Iterable[Record], prefix: str, shard_bytes: int
) -> tuple[list[dict[str, Any]], list[list[int] | None]]:
    """Write shards named shard.PREFIX.NNNNN.mds into `folder`.

    All records of a shard have the same columns, so a record with a new column begins a new shard.
    An index of tars is an exception, because it has one shard per tar. Its records hold no images,
    so all of them are read first to collect the columns.

    Returns:
        The shards' index entries, and the numbers of captions by shard (see `captions_by_shard`).
    """
    captions: list[int] = []
    shards: list[dict[str, Any]] = []
    columns: dict[str, str] = {}
    rest = iter(records)
    record = next(rest, None)
    if record is not None and record.image_place is not None:
        others = list(rest)
        for other in others:
            columns |= other.extra_columns
        rest = iter(others)
    while record is not None:
        columns |= record.extra_columns
        made = folder / f"mds.{prefix}.{len(shards)}"
        with shard_writer(made, shard_bytes, extra_columns=columns) as writer:
            while record is not None and record.extra_columns.keys() <= columns.keys():
                captions.append(len(record.captions))
                writer.write(record.sample())
                record = next(rest, None)
        for shard in writer.shards:
            name = f"shard.{prefix}.{len(shards):05}.mds"
            (made / shard["raw_data"]["basename"]).rename(folder / name)
            shard["raw_data"]["basename"] = name
            shards.append(shard)
    return shards, captions_by_shard(shards, captions)


def put_report(out: OutputFolder, folder: Path, report: Report) -> None:
    """Move the shards in a workshop folder to `out`, then write the report of their chunk."""
    name = report_name(report.number)
    (folder / REPORTS).mkdir()
    (folder / name).write_text(report.to_json())
    made = [shard for shard in report.shard_names if (folder / shard).exists()]
    out.put(folder, [*made, name])
