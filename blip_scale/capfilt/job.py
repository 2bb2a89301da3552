"""Run CapFilt on a whole set, in any number of processes and machines, and report statistics."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from blip_scale.capfilt import filtering
from blip_scale.capfilt.filtering import BINS, SYNTHETIC, WEB, Settings
from blip_scale.capfilt.sheet import sample_sheet
from blip_scale.data.conversion.output import OutputFolder
from blip_scale.data.conversion.pairs import Chunk
from blip_scale.data.conversion.run import Conversion, Part, Progress, convert
from blip_scale.storage.locations import is_local
from blip_scale.storage.untrusted import private_folder

STATISTICS_NAME = "statistics.json"
SHEET_NAME = "samples.html"


@dataclass(frozen=True)
class Job:
    """Input, output and settings of CapFilt on one set."""

    source: str
    """Folder or remote of MDS shards, as written by prepare_data."""
    out: str
    settings: Settings
    shard_bytes: int = 64 << 20
    shown: int = 48
    """Number of samples shown on the sheet."""


@dataclass(frozen=True)
class Task:
    """This process's part of a job."""

    part: Part
    workers: int
    scratch: str
    """Folder in which shards of a remote are cached and new shards are written."""


def run(job: Job, task: Task, show: Callable[[Progress], None]) -> dict[str, Any] | None:
    """Process one part of a job, and merge the parts when all are done.

    The same call resumes a job that was killed, and gives the same bytes.

    Returns:
        statistics of the whole set, or None while other parts are missing.

    Raises:
        ValueError: the output was begun with other input, settings or weights, or a checkpoint
            cannot caption or match.
    """
    settings = job.settings
    local = is_local(job.source)
    folder, remote = (job.source, None) if local else (_cache(job.source, task), job.source)
    store = filtering.store_of(folder, remote)
    chunks = []
    for number, shard in enumerate(store.shards):
        read = partial(filtering.read_shard, folder, remote, number, settings)
        fingerprint = json.dumps(shard.raw_data.hashes, sort_keys=True)
        chunks.append(Chunk(store.shard_name(number), read, fingerprint, shard.samples))
    loading = settings.loading
    # Load them on the CPU: forked workers share them, spawned workers load them to their GPU.
    on_cpu = replace(settings, loading=replace(loading, device="cpu", precision="fp32"))
    captioner, judge = filtering.models(on_cpu)
    plan = {
        "captioner": captioner.fingerprint,
        "filter": judge.fingerprint,
        "threshold": settings.threshold,
        "sampling": asdict(settings.sampling),
        "prompt": captioner.prompt if settings.prompt is None else settings.prompt,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "image_size": [captioner.image_size, judge.image_size],
        "precision": loading.precision,
    }
    conversion = Conversion(
        chunks, job.out, None, job.shard_bytes, task.workers, task.scratch,
        "fork" if local and settings == on_cpu else "spawn", plan,
    )  # fmt: skip
    summary = convert(conversion, task.part, show)
    if summary is None:
        return None
    statistics = _statistics(summary)
    out = OutputFolder(job.out, task.scratch)
    with out.workshop("statistics", per_process=True) as made:
        (made / SHEET_NAME).write_text(sample_sheet(store, out, statistics, job.shown, made))
        (made / STATISTICS_NAME).write_text(json.dumps(statistics, indent=2) + "\n")
        out.put(made, [SHEET_NAME, STATISTICS_NAME])
    return statistics


def _cache(source: str, task: Task) -> str:
    """Cache folder for shards of a remote, shared by a user's tasks on the same node.

    Raises:
        OSError: another user has taken the name of the folder.
    """
    name = f"capfilt-{os.geteuid()}-{xxhash.xxh3_64_hexdigest(source)}"
    return str(private_folder(Path(task.scratch) / name))


def _statistics(summary: dict[str, Any]) -> dict[str, Any]:
    """Statistics of the whole set from the tallies of the merge."""
    tallies = summary.get("tallies", {})

    def captions(kind: str) -> dict[str, Any]:
        kept, dropped = (tallies.get(f"{kind} {what}", 0) for what in ("kept", "dropped"))
        return {
            "read": kept + dropped,
            "kept": kept,
            "dropped": dropped,
            "kept_share": round(kept / max(1, kept + dropped), 4),
            "score_histogram": [tallies.get(f"{kind} score {n:02}", 0) for n in range(BINS)],
        }

    return {
        "images": summary["pairs"],
        "undecodable_images": summary["rejects"].get("undecodable", 0),
        WEB: captions(WEB),
        SYNTHETIC: captions(SYNTHETIC),
        "histogram_edges": [n / BINS for n in range(BINS + 1)],
        "settings": summary["made_by"]["rules"],
    }
