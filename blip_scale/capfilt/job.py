"""CapFilt of a whole set: chunks for any number of processes and machines, and what is told of it
at the end."""

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
    """What is made, from what, how."""

    source: str
    """Folder or remote of MDS shards, as prepare_data writes them."""
    out: str
    settings: Settings
    shard_bytes: int = 64 << 20
    shown: int = 48
    """Samples on the sheet."""


@dataclass(frozen=True)
class Task:
    """This process's part of a job."""

    part: Part
    workers: int
    scratch: str
    """Where shards of a remote are cached and made."""


def run(job: Job, task: Task, show: Callable[[Progress], None]) -> dict[str, Any] | None:
    """Work off a part, and merge when all parts are done.

    Killed at any time, it goes on where it was with the same call and gives the same bytes. Returns
    the statistics of the whole set, None while other parts are missing. Raises ValueError for an
    output that was begun with other input, settings or weights, and for checkpoints that can't
    caption or match.
    """
    settings = job.settings
    local = is_local(job.source)
    folder, remote = (job.source, None) if local else (_cache(job.source, task), job.source)
    store = filtering.store_of(folder, remote)
    chunks = [
        Chunk(
            name=store.shard_name(shard),
            read=partial(filtering.read_shard, folder, remote, shard, settings),
            fingerprint=json.dumps(reader.raw_data.hashes, sort_keys=True),
            pairs=reader.samples,
        )
        for shard, reader in enumerate(store.shards)
    ]
    loading = settings.loading
    # On the CPU: forked workers share them, spawned ones load them to their GPU.
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
    """Where shards of a remote lie while they are read; tasks of a user on the same node share it.

    Raises:
        OSError: another user has taken its name.
    """
    name = f"capfilt-{os.geteuid()}-{xxhash.xxh3_64_hexdigest(source)}"
    return str(private_folder(Path(task.scratch) / name))


def _statistics(summary: dict[str, Any]) -> dict[str, Any]:
    """Of the whole set, out of what the merge added up."""
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
