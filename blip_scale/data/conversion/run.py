"""Convert all chunks of a set, or the part of one machine, with several processes."""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from multiprocessing.sharedctypes import Synchronized
from typing import Any

from blip_scale.data.conversion.chunks import convert_chunk
from blip_scale.data.conversion.fingerprints import PairPrints
from blip_scale.data.conversion.holdout import HELDOUT, has_heldout
from blip_scale.data.conversion.locks import held, one_at_a_time
from blip_scale.data.conversion.merge import merge_chunks, remove_set
from blip_scale.data.conversion.output import OutputFolder
from blip_scale.data.conversion.pairs import Chunk
from blip_scale.data.conversion.report import REPORTS, report_name
from blip_scale.data.conversion.screening import Rules
from blip_scale.data.loading.workers import end_with_parent
from blip_scale.data.mds import INDEX_NAME

PLAN_NAME = "conversion.json"
_FORMAT = 4
_POLL_S = 0.2


@dataclass(frozen=True)
class Part:
    """Chunks converted by one machine: `number`, `number + of`, `number + 2 of`, ..."""

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise ValueError(
                f"--shard {self.number}/{self.of}: parts are counted from 0 to {self.of - 1}"
            )

    @classmethod
    def parse(cls, text: str) -> Part:
        """Parse `i/n`.

        Raises:
            ValueError: the text has another format.
        """
        number, slash, of = text.partition("/")
        if not (slash and number.isdigit() and of.isdigit()):
            raise ValueError(f"--shard {text}: give i/n, for example 0/8 to 7/8")
        return cls(int(number), int(of))


@dataclass(frozen=True)
class Progress:
    """Progress of this machine's part."""

    read: int
    rejected: int
    chunks_done: int
    chunks: int
    pairs: int | None
    """Total number of pairs to read; None if not yet known."""


@dataclass(frozen=True)
class Conversion:
    """A whole conversion job.

    The shards depend on all fields except `workers`, `scratch`, `start_method` and `tokenizer`.
    """

    chunks: Sequence[Chunk]
    out: str
    rules: Rules | None
    """Rules for screening; None if the chunks screen their own pairs."""
    shard_bytes: int = 64 << 20
    workers: int = 1
    scratch: str | None = None
    start_method: str = "fork"
    """Start method of worker processes. Use spawn if the chunks were listed from a remote, because
    the threads of its client do not survive a fork. A remote output always uses spawn."""
    settings: dict[str, Any] | None = None
    """Settings of chunks that screen their own pairs."""
    reading: dict[str, Any] = field(default_factory=dict)
    """Options of the source that change the pairs, by name."""
    tokenizer: str = ""
    """Tokenizer that counts tokens for the summary; "" to count no tokens."""

    def plan(self) -> dict[str, Any]:
        """Return the content of conversion.json. It must be equal in all parts and restarts."""
        prints = PairPrints(self.rules.images_below if self.rules else None)
        rules = self.settings
        if self.rules:
            rules = asdict(self.rules)
            # The folder may have a different path on another machine.
            rules["allow_outside"] = rules.pop("images_below") is None
            for name in ("raw_captions", "add_sha256"):  # keeps older plans valid
                if not rules[name]:
                    del rules[name]
        return {
            "format": _FORMAT,
            "reading": self.reading,
            "rules": rules,
            "shard_bytes": self.shard_bytes,
            "chunks": len(self.chunks),
            "input": [
                f"{chunk.fingerprint or prints.of(chunk.read())} {chunk.name}"
                for chunk in self.chunks
            ],
        }


def convert(
    job: Conversion,
    part: Part,
    show: Callable[[Progress], None] = lambda progress: None,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Convert the remaining chunks of a part, then merge if all parts are done.

    The conversion may be killed at any time. The same call then continues and gives the same bytes.
    Finished chunks are kept after any error.

    Args:
        job: the whole conversion.
        part: the chunks to convert here.
        show: called with the progress several times a second.
        overwrite: first remove the output of an earlier conversion.

    Returns:
        The summary of the whole set, or None if other parts are not finished.

    Raises:
        ValueError: the output was started with other input or options, another process is writing
            to it, or no pairs can be held out.
    """
    if not job.chunks:
        raise ValueError("there is nothing to convert: the input is empty")
    if overwrite and part.of > 1:
        raise ValueError("--overwrite and --shard: remove OUT yourself, once for all parts")
    if job.rules and isinstance(job.rules.holdout, int):
        _refuse_large_holdout(job.chunks, job.rules.holdout)
    out = OutputFolder(job.out, job.scratch)
    with held(out, part.number, part.of):
        _agree_on_plan(out, job.plan(), overwrite)
        numbers = range(part.number, len(job.chunks), part.of)
        done = out.names(REPORTS)
        todo = [number for number in numbers if report_name(number) not in done]
        if todo:
            _convert_chunks(job, out, todo, show)
        if len(out.names(REPORTS)) < len(job.chunks):
            return None
        with one_at_a_time(out):
            return merge_chunks(out, read_plan(out))


def _refuse_large_holdout(chunks: Sequence[Chunk], holdout: int) -> None:
    """Raise early if `holdout` is not below the number of pairs, where that number is known."""
    counts = [chunk.pairs for chunk in chunks if chunk.pairs is not None]
    if len(counts) == len(chunks) and holdout >= sum(counts):
        raise ValueError(
            f"--holdout {holdout}: the input has {sum(counts)} pairs; hold out fewer, or a share "
            "such as 2%"
        )


def merge(location: str, scratch: str | None = None) -> dict[str, Any]:
    """Merge the chunks of all parts. `convert` also merges when the last part ends.

    Raises:
        FileNotFoundError: no conversion was started at the location.
        ValueError: chunks are missing.
    """
    out = OutputFolder(location, scratch)
    plan = read_plan(out)
    with one_at_a_time(out):
        return merge_chunks(out, plan)


def read_plan(out: OutputFolder) -> dict[str, Any]:
    """Read conversion.json.

    Raises:
        FileNotFoundError: no conversion was started in the output.
    """
    if not out.has(PLAN_NAME):
        raise FileNotFoundError(f"{out.location}: no conversion was started here ({PLAN_NAME})")
    plan: dict[str, Any] = json.loads(out.read(PLAN_NAME))
    return plan


def _agree_on_plan(out: OutputFolder, plan: dict[str, Any], overwrite: bool) -> None:
    if not out.has(PLAN_NAME):
        others = [name for name in out.names() if name.startswith(("shard.", INDEX_NAME))]
        if has_heldout(out):
            others.append(HELDOUT)
        if others:
            raise ValueError(f"{out.location} holds another set ({min(others)}): choose another")
    elif overwrite:
        remove_set(out)
    else:
        differences = _differences(read_plan(out), plan)
        if differences:
            raise ValueError(
                f"{out.location} was started with other input or options "
                f"({'; '.join(differences)}): "
                "give the same again or another OUT, or remove it (prepare-data: --overwrite)"
            )
        return
    with out.workshop("plan", per_process=True) as folder:
        (folder / PLAN_NAME).write_text(json.dumps(plan, indent=2) + "\n")
        out.put(folder, [PLAN_NAME])


def _differences(begun: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    """Describe the differences between the plan in the output and this plan."""
    if begun.get("format") != plan["format"]:
        return [f"by a release whose format is {begun.get('format')}, not {plan['format']}"]
    changed: list[str] = []
    for name in ("reading", "rules"):
        before, now = begun.get(name) or {}, plan[name] or {}
        changed += [
            f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
    if begun.get("shard_bytes") != plan["shard_bytes"]:
        changed.append(f"shard_size was {begun.get('shard_bytes')} and is {plan['shard_bytes']}")
    if begun.get("input") != plan["input"]:
        changed.append(_input_difference(begun.get("input") or [], plan["input"]))
    return changed


def _input_difference(before: Sequence[str], now: Sequence[str]) -> str:
    pairs = zip_longest(before, now, fillvalue="")
    first_before, first_now = next(pair for pair in pairs if pair[0] != pair[1])
    names = [line.partition(" ")[2] for line in (first_before, first_now)]
    if not names[0]:
        return f"input: {names[1]} is new"
    if not names[1]:
        return f"input: {names[0]} is gone"
    if names[0] != names[1]:
        return f"input: {names[0]} was where {names[1]} is"
    return f"input: content, size or time of what is in {names[0]} has changed"


def _convert_chunks(
    job: Conversion, out: OutputFolder, todo: Sequence[int], show: Callable[[Progress], None]
) -> None:
    # The client of a remote has threads, which do not survive a fork.
    context = multiprocessing.get_context("spawn" if out.is_remote else job.start_method)
    others = set(multiprocessing.active_children())
    read, rejected = context.Value("q", 0), context.Value("q", 0)
    pool = ProcessPoolExecutor(job.workers, context, _enter_worker, (read, rejected))
    try:
        running = {
            pool.submit(
                _work, number, job.chunks[number], out, job.rules, job.shard_bytes, job.tokenizer
            )
            for number in todo
        }
        for finished in _as_finished(running):
            pairs = _expected_pairs([job.chunks[n] for n in todo], read.value, finished)
            show(Progress(read.value, rejected.value, finished, len(todo), pairs))
    except BrokenProcessPool as error:
        raise OSError(
            "a worker was killed (out of memory? then give fewer --workers); finished work is "
            "kept; the same command continues"
        ) from error
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # otherwise they would first finish their chunks
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _as_finished(running: set[Future[None]]) -> Iterator[int]:
    """Yield the number of finished chunks several times a second. Re-raise errors of chunks."""
    count = len(running)
    while running:
        finished, running = wait(running, _POLL_S, FIRST_COMPLETED)
        for future in finished:
            future.result()
        yield count - len(running)


def _expected_pairs(chunks: Sequence[Chunk], read: int, finished: int) -> int | None:
    counts = [chunk.pairs for chunk in chunks if chunk.pairs is not None]
    if len(counts) == len(chunks):
        return sum(counts)
    return round(read / finished * len(chunks)) if finished else None


_counters: list[Synchronized[int]] = []


def _enter_worker(*counters: Synchronized[int]) -> None:
    """Set up a worker: share the parent's counters, ignore Ctrl-C, and end with the parent."""
    _counters[:] = counters
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()


def _work(
    number: int,
    chunk: Chunk,
    out: OutputFolder,
    rules: Rules | None,
    shard_bytes: int,
    tokenizer: str,
) -> None:
    convert_chunk(number, chunk, out, rules, shard_bytes, _count, tokenizer)


def _count(*amounts: int) -> None:
    for counter, amount in zip(_counters, amounts, strict=True):
        with counter.get_lock():
            counter.value += amount
