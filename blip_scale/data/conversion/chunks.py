"""One chunk of the input -> its shards and its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

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
from blip_scale.data.shards import Record, captions_by_shard, shard_writer, with_first

Tick = Callable[[int, int], None]
"""tick(read, rejected): pairs since the last call."""
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
    """Read a chunk, screen its pairs, write its shards and then its report to `out`.

    `tokenizer` counts what the report says about tokens; without it nothing is said.

    The same chunk gives the same bytes. Raises OSError when the disk is full or a file can't be
    read; then nothing of this chunk is left in `out`.
    """
    report = Report(number, chunk.name)

    def records() -> Iterable[Record]:
        seen: set[str] = set()
        done = Counts()
        for found in chunk.read() if rules is None else read_safely(chunk):
            record = _take(found, rules, report, seen, tokenizer)
            if record is not None:
                report.ids.append(record.id)
                yield record
            if report.pairs.read % _TICK_EVERY == 0:
                tick(report.pairs.read - done.read, report.pairs.rejected - done.rejected)
                done = Counts(report.pairs.read, 0, report.pairs.rejected)
        tick(report.pairs.read - done.read, report.pairs.rejected - done.rejected)

    with out.workshop(f"{number:06}") as folder:
        write_chunk_shards(report, folder, records(), f"{number:06}", shard_bytes)
        put_report(out, folder, report)
    return report


def _take(
    found: Found, rules: Rules | None, report: Report, seen: set[str], tokenizer: str
) -> Record | None:
    """Screen one pair and count what becomes of it and of its captions."""
    if isinstance(found, Unused):
        _add(report, {found.kind: found.count})
        return None
    report.pairs.read += 1
    if isinstance(found, Reject):
        report.pairs.rejected += 1
        report.captions.read += found.captions
        report.captions.rejected += found.captions
        report.rejects.append(found)
        return None
    captions = _caption_count(found)
    report.captions.read += captions
    if found.id in seen:
        record, rejects, anew = None, [Reject(found.id, Reason.DUPLICATE_ID)], False
    elif isinstance(found, Screened):
        record, rejects, anew = found.record, found.rejects, False
        _add(report, found.tallies)
    else:
        assert rules is not None
        record, rejects, anew = screen(found, rules)
        if record is not None:
            _add(report, count_text(found, record, rules.max_words, tokenizer))
    report.rejects += rejects
    if record is None:
        report.pairs.rejected += 1
        report.captions.rejected += captions
        return None
    seen.add(found.id)
    report.pairs.written += 1
    report.captions.written += len(record.captions)
    report.captions.rejected += len(rejects)
    report.reencoded += anew
    return record


def read_safely(chunk: Chunk) -> Iterator[Found]:
    """What a chunk holds; where its reader fails, a reject says at which record.

    Raises OSError where the disk or the network fails: that is no property of a record.
    """
    count = 0
    try:
        for found in chunk.read():
            yield found
            count += 1
    except (OSError, MemoryError):
        raise
    except Exception as error:  # each kind of damage is an exception of its own
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
    report: Report, folder: Path, records: Iterable[Record], prefix: str, shard_bytes: int
) -> None:
    """Shards named shard.PREFIX.NNNNN.mds in `folder`; what the index is to say of them goes into
    the report.
    """
    made = folder / "mds"
    captions: list[int] = []
    first, records = with_first(records)
    with shard_writer(made, shard_bytes, first=first) as writer:
        for record in records:
            captions.append(len(record.captions))
            writer.write(record.sample())
    for number, shard in enumerate(writer.shards):
        name = f"shard.{prefix}.{number:05}.mds"
        (made / shard["raw_data"]["basename"]).rename(folder / name)
        shard["raw_data"]["basename"] = name
    report.shards = writer.shards
    report.shard_captions = captions_by_shard(writer.shards, captions)


def put_report(out: OutputFolder, folder: Path, report: Report) -> None:
    """Move the shards and then the report of a chunk out of its workshop."""
    name = report_name(report.number)
    (folder / REPORTS).mkdir()
    (folder / name).write_text(report.to_json())
    out.put(folder, [*report.shard_names, name])
