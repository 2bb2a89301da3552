"""All chunks of a set, or one machine's part of them, over the processes of this machine."""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import xxhash

from blip_scale.data.conversion.chunks import convert_chunk
from blip_scale.data.conversion.merge import merge_chunks
from blip_scale.data.conversion.output import OutputFolder
from blip_scale.data.conversion.pairs import Chunk
from blip_scale.data.conversion.report import REPORTS, report_name
from blip_scale.data.conversion.screening import Rules
from blip_scale.data.loading.workers import end_with_parent
from blip_scale.data.mds import INDEX_NAME

PLAN_NAME = "conversion.json"
_POLL_S = 0.2


@dataclass(frozen=True)
class Part:
    """The chunks `number`, `number + of`, `number + 2 of`, ... are this machine's."""

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise ValueError(
                f"--shard {self.number}/{self.of}: parts are counted from 0 to {self.of - 1}"
            )

    @classmethod
    def parse(cls, text: str) -> Part:
        """`i/n`; raises ValueError for anything else."""
        number, slash, of = text.partition("/")
        if not (slash and number.isdigit() and of.isdigit()):
            raise ValueError(f"--shard {text}: give i/n, for example 0/8 to 7/8")
        return cls(int(number), int(of))


@dataclass(frozen=True)
class Progress:
    """Of the part that runs here."""

    read: int
    rejected: int
    chunks_done: int
    chunks: int
    pairs: int | None
    """To read in all; None: not known yet."""


@dataclass(frozen=True)
class Conversion:
    """A whole job; all but `workers`, `scratch` and `start_method` decides about the bytes
    written."""

    chunks: Sequence[Chunk]
    out: str
    rules: Rules | None
    """None: the chunks screen their pairs themselves."""
    shard_bytes: int = 64 << 20
    workers: int = 1
    scratch: str | None = None
    start_method: str = "fork"
    """Of the workers: spawn where the chunks were listed from a remote, as its client's threads do
    not outlive a fork. For a remote output it is spawn in any case."""
    settings: dict[str, Any] | None = None
    """What decides about the pairs of chunks that screen them themselves."""

    def plan(self) -> dict[str, Any]:
        """What conversion.json says: all parts and restarts must agree on it."""
        digest = xxhash.xxh3_128()
        for chunk in self.chunks:
            digest.update(f"{chunk.name}\n{chunk.fingerprint}\n".encode())
        return {
            "format": 2,
            "chunks": len(self.chunks),
            "input": digest.hexdigest(),
            "shard_bytes": self.shard_bytes,
            "rules": asdict(self.rules) if self.rules else self.settings,
        }


def convert(
    job: Conversion, part: Part, show: Callable[[Progress], None] = lambda progress: None
) -> dict[str, Any] | None:
    """Convert the chunks of a part that are not converted yet, then merge if all parts are done.

    Returns the summary of the whole set, None while other parts are missing. Killed at any time, it
    goes on where it was with the same call and gives the same bytes. Raises ValueError for an
    output that was begun with other input or rules; whatever the error, finished chunks are kept.
    """
    if not job.chunks:
        raise ValueError("there is nothing to convert")
    out = OutputFolder(job.out, job.scratch)
    _agree_on_plan(out, job.plan())
    mine = range(part.number, len(job.chunks), part.of)
    done = out.names(REPORTS)
    todo = [number for number in mine if report_name(number) not in done]
    if todo:
        _convert_chunks(job, out, todo, show)
    if len(out.names(REPORTS)) < len(job.chunks):
        return None
    return merge_chunks(out, read_plan(out))


def merge(location: str, scratch: str | None = None) -> dict[str, Any]:
    """Merge what all parts have converted; `convert` does it by itself when the last part ends.

    Raises FileNotFoundError where nothing was begun, ValueError where chunks are missing.
    """
    out = OutputFolder(location, scratch)
    return merge_chunks(out, read_plan(out))


def read_plan(out: OutputFolder) -> dict[str, Any]:
    """Raises FileNotFoundError where no conversion was begun."""
    if not out.has(PLAN_NAME):
        raise FileNotFoundError(f"{out.location}: no conversion was begun here ({PLAN_NAME})")
    plan: dict[str, Any] = json.loads(out.read(PLAN_NAME))
    return plan


def _agree_on_plan(out: OutputFolder, plan: dict[str, Any]) -> None:
    if not out.has(PLAN_NAME):
        others = [name for name in out.names() if name.startswith(("shard.", INDEX_NAME))]
        if others:
            raise ValueError(f"{out.location} holds another set ({min(others)}): choose another")
        with out.workshop("plan", own=True) as folder:
            (folder / PLAN_NAME).write_text(json.dumps(plan, indent=2) + "\n")
            out.put(folder, [PLAN_NAME])
        return
    begun = read_plan(out)
    changed = [key for key in plan if begun.get(key) != plan[key]]
    if changed:
        said = "; ".join(f"{key} was {begun.get(key)} and is {plan[key]}" for key in changed)
        raise ValueError(
            f"{out.location} was begun with other input or settings ({said}): give the same again, "
            "or another folder"
        )


def _convert_chunks(
    job: Conversion, out: OutputFolder, todo: Sequence[int], show: Callable[[Progress], None]
) -> None:
    # The client of a remote has threads, which do not outlive a fork.
    context = multiprocessing.get_context("spawn" if out.is_remote else job.start_method)
    others = set(multiprocessing.active_children())
    read, rejected = context.Value("q", 0), context.Value("q", 0)
    pool = ProcessPoolExecutor(job.workers, context, _enter_worker, (read, rejected))
    try:
        running = {
            pool.submit(_work, number, job.chunks[number], out, job.rules, job.shard_bytes)
            for number in todo
        }
        for finished in _as_finished(running):
            pairs = _expected_pairs([job.chunks[n] for n in todo], read.value, finished)
            show(Progress(read.value, rejected.value, finished, len(todo), pairs))
    except BrokenProcessPool as error:
        raise OSError(
            "a worker was killed (out of memory? then give fewer --workers); what is finished is "
            "kept, the same command goes on"
        ) from error
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # else they would finish their chunks first
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _as_finished(running: set[Future[None]]) -> Iterator[int]:
    """The number of finished chunks, several times a second; raises what a chunk raised."""
    count = len(running)
    while running:
        finished, running = wait(running, _POLL_S, FIRST_COMPLETED)
        for future in finished:
            future.result()
        yield count - len(running)


def _expected_pairs(chunks: Sequence[Chunk], read: int, finished: int) -> int | None:
    known = [chunk.pairs for chunk in chunks if chunk.pairs is not None]
    if len(known) == len(chunks):
        return sum(known)
    return round(read / finished * len(chunks)) if finished else None


_counters: list[Synchronized[int]] = []


def _enter_worker(*counters: Synchronized[int]) -> None:
    """Count for the parent; Ctrl-C is the parent's business; end when the parent is killed."""
    _counters[:] = counters
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()


def _work(
    number: int, chunk: Chunk, out: OutputFolder, rules: Rules | None, shard_bytes: int
) -> None:
    convert_chunk(number, chunk, out, rules, shard_bytes, _count)


def _count(*amounts: int) -> None:
    for counter, amount in zip(_counters, amounts, strict=True):
        with counter.get_lock():
            counter.value += amount
