"""Run CapFilt on a whole set with any number of processes and machines, and report statistics."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from blip_scale.capfilt import filtering
from blip_scale.capfilt.filtering import BINS, SYNTHETIC, WEB, Settings
from blip_scale.capfilt.sheet import sample_sheet
from blip_scale.data.conversion.output import OutputFolder
from blip_scale.data.conversion.overlay import images_entry
from blip_scale.data.conversion.pairs import Chunk, Reason
from blip_scale.data.conversion.report import Report, report_name
from blip_scale.data.conversion.run import PLAN_NAME, Conversion, Part, Progress, convert
from blip_scale.data.mds import INDEX_NAME, parse_shard
from blip_scale.data.overlays import MANIFEST_NAME, VERSION, OverlayWriter
from blip_scale.data.reading.stream_store import StreamStore
from blip_scale.storage.locations import is_local, local_path
from blip_scale.storage.untrusted import private_folder

PARTS = "parts"
"""Folder in the output of an overlay. It holds the result for each shard of images."""
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
    """Local folder where remote shards are cached and new shards are written."""


def run(job: Job, task: Task, show: Callable[[Progress], None]) -> dict[str, Any] | None:
    """Process one part of a job, and merge the parts when all are done.

    Call it again to resume a killed job; the output has the same bytes as without interruption.

    Returns:
        statistics of the whole set, or None while other parts are missing.

    Raises:
        ValueError: the output was started with other input, settings or weights, or a checkpoint
            lacks the decoder or the matching head.
    """
    settings = job.settings
    local = is_local(job.source)
    folder, remote = (job.source, None) if local else (_cache(job.source, task), job.source)
    store = filtering.store_of(folder, remote)
    chunks = []
    loading = settings.loading
    # Load them on the CPU: forked workers share them, spawned workers load them to their GPU.
    on_cpu = replace(settings, loading=replace(loading, device="cpu", precision="fp32"))
    plan = _plan(on_cpu, settings)
    if settings.endpoint is not None:
        settings = replace(
            settings, answers=str(_answers_folder(job, task, plan, store.shards.index_sha256))
        )
    is_on_cpu = settings.loading == on_cpu.loading
    for number, shard in enumerate(store.shards):
        read = partial(filtering.read_shard, folder, remote, number, settings)
        fingerprint = json.dumps(shard.raw_data.hashes, sort_keys=True)
        chunks.append(Chunk(store.shard_name(number), read, fingerprint, shard.samples))
    made_in = f"{job.out.rstrip('/')}/{PARTS}" if settings.without_images else job.out
    out, parts = OutputFolder(job.out, task.scratch), OutputFolder(made_in, task.scratch)
    if settings.without_images and out.has(INDEX_NAME) and not parts.has(PLAN_NAME):
        raise ValueError(f"{job.out} holds another set ({INDEX_NAME}): choose another OUT")
    conversion = Conversion(
        chunks, made_in, None, job.shard_bytes, task.workers, task.scratch,
        "fork" if local and is_on_cpu else "spawn", plan,
    )  # fmt: skip
    summary = convert(conversion, task.part, show)
    if summary is None:
        return None
    if settings.endpoint is not None:
        shutil.rmtree(settings.answers, ignore_errors=True)
    statistics = _statistics(summary)
    if settings.without_images:
        _write_overlay(job, store, out, parts, statistics)
    with out.workshop("statistics", per_process=True) as made:
        (made / SHEET_NAME).write_text(sample_sheet(store, parts, statistics, job.shown, made))
        (made / STATISTICS_NAME).write_text(json.dumps(statistics, indent=2) + "\n")
        out.put(made, [SHEET_NAME, STATISTICS_NAME])
    return statistics


def _plan(on_cpu: Settings, settings: Settings) -> dict[str, Any]:
    """Settings that determine the output. All parts and restarts must use the same."""
    captioner, judge = filtering.models(on_cpu)
    plan = {
        "captioner": captioner.fingerprint if captioner else "",
        "filter": judge.fingerprint if judge else "",
        "threshold": settings.threshold,
        "sampling": asdict(settings.sampling),
        "prompt": settings.prompt,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "image_size": [model.image_size if model else 0 for model in (captioner, judge)],
        "precision": settings.loading.precision,
    }
    if captioner is not None and settings.prompt is None:
        plan["prompt"] = captioner.prompt
    if settings.endpoint is not None:
        plan |= {"captioner": settings.endpoint.provenance(), "sampling": None, "prompt": None}
    if settings.without_images:
        plan["role"] = settings.role
    return plan


def _answers_folder(job: Job, task: Task, plan: dict[str, Any], images_sha256: str) -> Path:
    """Folder for captions of an external captioner: in a local output, else in `scratch`."""
    identity = json.dumps([job.source, images_sha256, job.out, plan])
    name = f"answers-{xxhash.xxh3_64_hexdigest(identity)}"
    if is_local(job.out):
        return local_path(job.out) / name
    return private_folder(Path(task.scratch) / f"capfilt-{os.geteuid()}-{name}")


def _write_overlay(
    job: Job, store: StreamStore, out: OutputFolder, parts: OutputFolder, statistics: dict[str, Any]
) -> None:
    """Write the kept captions of all parts as an overlay of the input."""
    with out.workshop("overlay") as folder:
        writer = OverlayWriter(folder / "mds", store.shards.index_sha256)
        for number, samples in enumerate(store.shard_samples.tolist()):
            kept = _kept_of(parts, number, folder)
            for place in range(samples):
                row = kept.get(place)
                if row is None:
                    writer.write("", [], [])
                else:
                    writer.write(row["id"], row["captions"], row["roles"], row["annotations"])
            writer.end_shard()
        writer.finish()
        manifest = {
            "version": VERSION,
            "images": images_entry(store, job.source),
            "samples": {"all": store.samples, "with_captions": statistics["images"]["written"]},
            "roles": dict(sorted(writer.roles.items())),
            "made_by": statistics["settings"],
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        (folder / "mds" / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
        out.put(folder / "mds", [*writer.names, MANIFEST_NAME, INDEX_NAME])


def _kept_of(parts: OutputFolder, number: int, folder: Path) -> dict[int, dict[str, Any]]:
    """Read the samples of a part, by index of their image in its shard."""
    report = Report.from_json(parts.read(report_name(number)))
    kept = {}
    for entry in report.shards:
        path = parts.fetch(entry["raw_data"]["basename"], folder / "fetched")
        shard = parse_shard(path.parent, entry)
        for index in range(shard.samples):
            sample = shard.read(index)
            kept[int(sample["uid"])] = sample
    return kept


def _cache(source: str, task: Task) -> str:
    """Cache folder for shards of a remote, shared by a user's tasks on the same node.

    Raises:
        OSError: another user owns a folder of this name.
    """
    name = f"capfilt-{os.geteuid()}-{xxhash.xxh3_64_hexdigest(source)}"
    return str(private_folder(Path(task.scratch) / name))


def _statistics(summary: dict[str, Any]) -> dict[str, Any]:
    """Compute statistics of the whole set from the tallies of the merge."""
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
        "images_without_answer": summary["rejects"].get(str(Reason.NO_ANSWER), 0),
        "reject_examples": summary["reject_examples"],
        WEB: captions(WEB),
        SYNTHETIC: captions(SYNTHETIC),
        "histogram_edges": [n / BINS for n in range(BINS + 1)],
        "settings": summary["made_by"]["rules"],
    }
