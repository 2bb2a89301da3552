"""Decide what becomes of a SLURM job whose srun has ended: done, back into the queue, or enough.

python slurm/requeue.py EXIT_CODE OUTPUT_DIR, inside the batch script (slurm/train.sh calls it).
0 is the end of the run. 75, a stop on request, goes back into the queue, and so does a failure; but
after MAX_FAILURES (environment, 3) failures of a job without a newer checkpoint in between, it
stops with OUTPUT_DIR/failure_report.txt. 2, refused input, stops at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from blip_scale.config import exit_codes
from blip_scale.storage import run_folder

_KEPT = 100
_TAIL_BYTES = 32 * 1024
_LOGS_SHOWN, _LINES_SHOWN = 6, 20
_TROUBLE = re.compile(
    r"Traceback|\bERROR\b|\w*Error\b|\bFatal\b|terminate called|(?:train\.py|blip.scale)\b.*: "
)


@dataclass(frozen=True)
class Attempt:
    """One start of a job, from its srun to the end of it."""

    job: str
    restart: int
    """Starts of the job before this one."""
    exit_code: int
    failed: bool
    checkpoint_step: int
    """Newest committed checkpoint when it ended; 0 without one."""
    nodes: str
    ended: float
    """Unix time."""
    seconds: int


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code of the batch script."""
    options = _parser().parse_args(arguments)
    if options.exit_code == exit_codes.DONE:
        (options.output_dir / run_folder.FAILURE_REPORT).unlink(missing_ok=True)
        print("the run is done")
        return exit_codes.DONE
    job = _job(os.environ["SLURM_JOB_ID"])
    if job.get("JobState") != "RUNNING" and job.get("Reason") != "TimeLimit":
        # Cancelled, or put back into the queue by SLURM itself: a node failed, preemption.
        print(f"not requeued here: SLURM has the job as {job.get('JobState', 'unknown')}")
        return options.exit_code
    try:
        attempts = note_attempt(options.output_dir, options.exit_code, options.seconds)
    except OSError as error:  # who cannot count failures must not start for ever
        print(f"not requeued: {options.output_dir} takes no record of this failure: {error}")
        return options.exit_code
    last, limit = attempts[-1], int(os.environ.get("MAX_FAILURES", "3"))
    failures = failures_without_progress(attempts)
    print(
        f"attempt {last.restart} ended with exit code {last.exit_code} after {last.seconds} s; "
        f"newest checkpoint: step {last.checkpoint_step}"
    )
    if last.exit_code == exit_codes.REFUSED and not last.failed:
        print("not requeued: the input was refused (see above); mend it and submit again")
    elif last.failed and failures >= limit:
        report = options.output_dir / run_folder.FAILURE_REPORT
        report.write_text(_report(attempts, failures, options.output_dir, job), encoding="utf-8")
        print(f"not requeued: failed {failures} times without a newer checkpoint; see {report}")
    elif job.get("Requeue") == "0":
        print("not requeued: the job has Requeue=0; submit again to go on")
    else:
        return _requeue(last)
    return options.exit_code


def note_attempt(output_dir: Path, exit_code: int, seconds: int) -> list[Attempt]:
    """Add this attempt to OUTPUT_DIR/attempts.json; gives those of this job, this one last."""
    file = output_dir / run_folder.ATTEMPTS
    heartbeat = _heartbeat(output_dir)
    now = time.time()
    began = heartbeat["time"] >= now - seconds and heartbeat["phase"] != "starting"
    refused = (
        exit_code == exit_codes.REFUSED and not began
    )  # in the middle of a run it is a failure
    attempt = Attempt(
        job=os.environ["SLURM_JOB_ID"],
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        exit_code=exit_code,
        failed=exit_code != exit_codes.REQUEUE and not refused,
        checkpoint_step=newest_checkpoint(output_dir),
        nodes=os.environ.get("SLURM_JOB_NODELIST", ""),
        ended=now,
        seconds=seconds,
    )
    attempts = [*_earlier(file), asdict(attempt)][-_KEPT:]
    draft = file.with_name(file.name + ".partial")
    draft.write_text(json.dumps(attempts, indent=1) + "\n", encoding="utf-8")
    draft.replace(file)
    return [Attempt(**entry) for entry in attempts if entry["job"] == attempt.job]


def newest_checkpoint(output_dir: Path) -> int:
    """Step of the newest committed checkpoint, 0 without one.

    By the folders in OUTPUT_DIR and, as checkpoints may lie elsewhere, by the heartbeat.
    """
    folders = (output_dir / run_folder.CHECKPOINTS).glob("*")
    steps = run_folder.steps(path.name for path in folders)
    return max([0, *steps, int(_heartbeat(output_dir)["checkpoint_step"])])


def failures_without_progress(attempts: list[Attempt]) -> int:
    """Failures at the end of `attempts` since the newest checkpoint last rose."""
    newest, count = -1, 0
    for attempt in attempts:
        if attempt.checkpoint_step > newest:
            newest, count = attempt.checkpoint_step, 0
        count += attempt.failed
    return count


def _requeue(last: Attempt) -> int:
    """Put the job back; SLURM ends this script while it does."""
    print(f"requeued: goes on at step {last.checkpoint_step}", flush=True)
    done = subprocess.run(["scontrol", "requeue", last.job], check=False)
    if done.returncode:
        print("scontrol could not requeue the job; submit again to go on")
        return last.exit_code
    time.sleep(60)
    return exit_codes.DONE


def _job(job_id: str) -> dict[str, str]:
    """What SLURM knows of the job: JobState, Reason, Requeue, StdOut ..."""
    command = ["scontrol", "show", "job", "--oneliner", job_id]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return dict(re.findall(r"(\w+)=(\S+)", shown))


def _report(attempts: list[Attempt], failures: int, output_dir: Path, job: dict[str, str]) -> str:
    """What a person needs to find the cause."""
    last = attempts[-1]
    lines = [
        f"Job {last.job} ({job.get('JobName', '?')}) was stopped: it failed {failures} times "
        f"without a checkpoint newer than step {last.checkpoint_step}.",
        "Mend the cause and submit again: the run goes on at that step.",
        "",
        f"{'attempt':>7}  {'ended':19}  {'seconds':>7}  {'code':>4}  {'checkpoint':>10}  nodes",
    ]
    for one in attempts:
        ended = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.ended))
        lines.append(
            f"{one.restart:7}  {ended}  {one.seconds:7}  {one.exit_code:4}  "
            f"{one.checkpoint_step:10}  {one.nodes}"
        )
    heartbeat = _json(output_dir / run_folder.HEARTBEAT)
    lines += ["", f"Last heartbeat: {json.dumps(heartbeat)}"] if heartbeat else []
    logs = output_dir / run_folder.LOGS
    lines += ["", f"Log of the job: {job.get('StdOut', '?')}", f"Logs: {logs}", ""]
    lines += _last_words(logs, last.ended - last.seconds)
    return "\n".join(lines) + "\n"


def _last_words(logs: Path, since: float) -> Iterator[str]:
    """The ends of the logs that hold an error; those that stopped first, and are nearest to the
    cause, first."""
    written = {file: file.stat().st_mtime for file in logs.glob(run_folder.LOG_PATTERN)}
    shown = 0
    for file in sorted(written, key=lambda file: written[file]):
        if written[file] < since or shown == _LOGS_SHOWN:
            continue
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()
        marked = [number for number, line in enumerate(lines) if _TROUBLE.search(line)]
        if marked:
            shown += 1
            end = marked[-1] + 3
            yield from [f"== {file}", *lines[max(0, end - _LINES_SHOWN) : end], ""]


def _heartbeat(output_dir: Path) -> dict[str, Any]:
    """What heartbeat.json says; a value that it lacks, or that is of another type, has its default.

    A damaged file must not keep a job from going on.
    """
    defaults: dict[str, Any] = {"time": 0.0, "phase": "starting", "checkpoint_step": 0}
    found = _json(output_dir / run_folder.HEARTBEAT)
    if not isinstance(found, dict):
        return defaults
    kinds: dict[str, Any] = {"time": (int, float), "phase": str, "checkpoint_step": int}
    usable = {name: found[name] for name in kinds if isinstance(found.get(name), kinds[name])}
    return defaults | usable


def _earlier(file: Path) -> list[dict[str, Any]]:
    """Attempts that were noted before; what isn't one is left out."""
    entries = _json(file)
    names = {one.name for one in fields(Attempt)}
    entries = entries if isinstance(entries, list) else []
    return [one for one in entries if isinstance(one, dict) and one.keys() == names]


def _json(file: Path) -> Any:
    """Content of a JSON file; None where it is missing or torn."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Requeue a job, or stop it with a report.")
    parser.add_argument("exit_code", type=int, help="what srun ended with")
    parser.add_argument("output_dir", type=Path, help="folder of the run")
    parser.add_argument("--seconds", type=int, default=0, help="how long the attempt took")
    return parser


if __name__ == "__main__":
    sys.exit(main())
