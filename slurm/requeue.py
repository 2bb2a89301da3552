"""Decide what to do when the ranks of a SLURM job have ended. slurm/run_ranks.py calls it.

Exit codes of srun:

- 0: the run is done.
- 75: the run stopped on request. The job is requeued.
- 2: the input was refused. The job stops.
- Others: a failure. The ranks are restarted in the same allocation. For the last of MAX_FAILURES
  attempts without a newer checkpoint, the job is requeued to get another allocation. If that fails
  too, the job stops and writes OUTPUT_DIR/failure_report.txt.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from blip_scale.config import exit_codes
from blip_scale.storage import run_folder

_KEPT = 100
_TAIL_BYTES = 32 * 1024
_LOGS_SHOWN, _LINES_SHOWN = 6, 20
_STACK_LINES_SHOWN = 60
_STALLED = re.compile(r"rank \d+ on .* stalled: ")
_NO_CONTROLLER = re.compile("Unable to contact slurm controller|Socket timed out|Zero Bytes")
_CONTROLLER_S, _CONTROLLER_EVERY_S = 1800, 10
"""Seconds to wait for a controller that is down, and seconds between two attempts."""
_REGISTER_S = 30
"""Seconds to wait after the controller is back. Until its nodes have registered, it starts no steps
on them ("Memory required by task is not available")."""
_KILL_WAIT_S = 30.0
"""SLURM's default of KillWait."""
_LAST_RESTART_S = 600
"""Do not restart if fewer seconds than this are left until the time limit."""
_TROUBLE = re.compile(
    r"Traceback|\bERROR\b|\w*Error\b|\bFatal\b|terminate called|(?:train\.py|blip.scale)\b.*: "
)


class Next(Enum):
    """Decision after an attempt."""

    RESTART = "restart"
    """Restart the ranks in this allocation."""
    REQUEUE = "requeue"
    STOP = "stop"


@dataclass(frozen=True)
class Attempt:
    """One start of a job's ranks, from the start of srun to the end."""

    job: str
    restart: int
    """Number of earlier allocations of this job."""
    launch: int
    """Number of earlier starts in this allocation."""
    exit_code: int
    failed: bool
    checkpoint_step: int
    """Step of the newest committed checkpoint at the end; 0 without a checkpoint."""
    nodes: str
    cause: str
    """The rank that ended or stalled first, its node, and how it ended; empty if unknown."""
    failed_at: float
    """Unix time at which the first rank ended; equal to `ended` if unknown."""
    ended: float
    """Unix time."""
    seconds: int


def decide(
    attempts: list[Attempt], job: Mapping[str, str], limit: int, is_stop_requested: bool = False
) -> tuple[Next, str]:
    """Decide what to do after the newest attempt, which has not finished the recipe.

    Args:
        attempts: attempts of the job, oldest first.
        job: SLURM's fields of the job.
        limit: number of failures without a newer checkpoint after which the job stops.
        is_stop_requested: whether the batch script was asked to stop. The ranks may have failed
            before they stopped.

    Returns:
        The decision, and its reason.
    """
    last, failures = attempts[-1], failures_without_progress(attempts)
    if last.exit_code == exit_codes.REFUSED and not last.failed:
        return Next.STOP, "the input was refused (see above); fix it and submit again"
    if last.failed and failures >= limit:
        return Next.STOP, f"failed {failures} times without a newer checkpoint"
    if not last.failed or is_stop_requested:
        decision, reason = Next.REQUEUE, "stopped on request"
    elif job.get("Reason") == "TimeLimit" or _seconds_left(job) < _LAST_RESTART_S:
        decision, reason = Next.REQUEUE, "the time limit is near"
    elif failures == limit - 1 and job.get("Requeue") != "0":
        decision, reason = Next.REQUEUE, f"failure {failures} of {limit}: the last try"
    else:
        return Next.RESTART, f"failure {failures} of {limit} without a newer checkpoint"
    if job.get("Requeue") == "0":
        return Next.STOP, f"{reason}, and the job has Requeue=0; submit again to resume"
    return decision, reason


def _seconds_left(job: Mapping[str, str]) -> float:
    """Seconds until SLURM ends the job; infinity if it has no time limit."""
    try:
        end = time.mktime(time.strptime(job.get("EndTime", ""), "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return float("inf")
    return end - time.time()


def note_attempt(
    output_dir: Path,
    exit_code: int,
    seconds: float,
    launch: int = 0,
    nodes: str = "",
    cause: str = "",
    failed_at: float | None = None,
) -> list[Attempt]:
    """Add an attempt that has just ended to OUTPUT_DIR/attempts.json.

    Returns:
        The attempts of this job, oldest first.

    Raises:
        OSError: the file can't be written.
    """
    file = output_dir / run_folder.ATTEMPTS
    heartbeat = _heartbeat(output_dir)
    now = time.time()
    began = heartbeat["time"] >= now - seconds and heartbeat["phase"] != "starting"
    # Once training has started, code 2 is a failure.
    refused = exit_code == exit_codes.REFUSED and not began
    attempt = Attempt(
        job=os.environ["SLURM_JOB_ID"],
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        launch=launch,
        exit_code=exit_code,
        failed=exit_code != exit_codes.REQUEUE and not refused,
        checkpoint_step=newest_checkpoint(output_dir),
        nodes=nodes,
        cause=cause,
        failed_at=now if failed_at is None else failed_at,
        ended=now,
        seconds=round(seconds),
    )
    attempts = [*_earlier(file), asdict(attempt)][-_KEPT:]
    draft = file.with_name(file.name + ".partial")
    draft.write_text(json.dumps(attempts, indent=1) + "\n", encoding="utf-8")
    draft.replace(file)
    return [Attempt(**entry) for entry in attempts if entry["job"] == attempt.job]


def newest_checkpoint(output_dir: Path) -> int:
    """Step of the newest committed checkpoint; 0 without a checkpoint.

    It is read from the folders in OUTPUT_DIR and from the heartbeat, because checkpoints may be in
    another place.
    """
    folders = (output_dir / run_folder.CHECKPOINTS).glob("*")
    steps = run_folder.steps(path.name for path in folders)
    return max([0, *steps, int(_heartbeat(output_dir)["checkpoint_step"])])


def failures_without_progress(attempts: list[Attempt]) -> int:
    """Number of failures since the last attempt that wrote a newer checkpoint."""
    newest, count = -1, 0
    for attempt in attempts:
        if attempt.checkpoint_step > newest:
            newest, count = attempt.checkpoint_step, 0
        count += attempt.failed
    return count


def requeue(job_id: str) -> int:
    """Requeue the job and return the batch script's exit code. SLURM may kill the script first."""
    result = _scontrol("requeue", job_id)
    if result.returncode > 0:  # < 0: SLURM killed scontrol together with the job
        reason = result.stderr.strip()
        print(f"scontrol could not requeue the job ({reason}); submit again to resume", flush=True)
        return exit_codes.FAILED
    time.sleep(60)
    return exit_codes.DONE


def job_fields(job_id: str) -> dict[str, str]:
    """SLURM's fields of the job: JobState, Reason, Requeue, StdOut ..."""
    shown = _scontrol("show", "job", "--oneliner", job_id).stdout
    return dict(re.findall(r"(\w+)=(\S+)", shown))


def kill_wait_s() -> float:
    """Seconds from SIGTERM to SIGKILL when SLURM ends a job, from its configuration."""
    shown = re.search(r"^KillWait\s*=\s*(\d+)", _scontrol("show", "config").stdout, re.MULTILINE)
    return float(shown[1]) if shown else _KILL_WAIT_S


def _scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run scontrol, retrying while the controller is down, which must not end the job."""
    command = ["scontrol", *arguments]
    deadline = time.monotonic() + _CONTROLLER_S
    was_down = False
    while True:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        is_down = result.returncode != 0 and _NO_CONTROLLER.search(result.stderr)
        if not is_down or time.monotonic() > deadline:
            if was_down:
                time.sleep(_REGISTER_S)
            return result
        was_down = True
        print(f"waiting for SLURM's controller: {result.stderr.strip()}", flush=True)
        time.sleep(_CONTROLLER_EVERY_S)


def write_report(attempts: list[Attempt], output_dir: Path, job: Mapping[str, str]) -> Path:
    """Write the failure report and return its path."""
    last, failures = attempts[-1], failures_without_progress(attempts)
    lines = [
        f"Job {last.job} ({job.get('JobName', '?')}) was stopped: it failed {failures} times "
        f"without a checkpoint newer than step {last.checkpoint_step}.",
        "Fix the cause and submit again: the run resumes at that step.",
        "",
        f"{'attempt':>7}  {'ended':19}  {'seconds':>7}  {'code':>4}  {'checkpoint':>10}  nodes; "
        "first to end",
    ]
    for attempt in attempts:
        ended = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.ended))
        lines.append(
            f"{f'{attempt.restart}.{attempt.launch}':>7}  {ended}  {attempt.seconds:7}  "
            f"{attempt.exit_code:4}  {attempt.checkpoint_step:10}  {attempt.nodes}; "
            f"{attempt.cause or 'not known'}"
        )
    heartbeat = _json(output_dir / run_folder.HEARTBEAT)
    lines += ["", f"Last heartbeat: {json.dumps(heartbeat)}"] if heartbeat else []
    logs = output_dir / run_folder.LOGS
    lines += ["", f"Log of the job: {job.get('StdOut', '?')}", f"Logs: {logs}", ""]
    lines += _last_words(logs, last.ended - last.seconds)
    report = output_dir / run_folder.FAILURE_REPORT
    report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return report


def stalls_since(output_dir: Path, since: float) -> list[dict[str, Any]]:
    """Stalls that ended ranks after a Unix time: entries of OUTPUT_DIR/stalls.jsonl."""
    try:
        lines = (output_dir / run_folder.STALLS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    stalls = []
    for line in lines:
        try:
            entry = json.loads(line)
            if entry["time"] >= since:
                stalls.append(entry)
        except (ValueError, LookupError, TypeError):  # a line written by two nodes at the same time
            continue
    return stalls


def _last_words(logs: Path, since: float) -> Iterator[str]:
    """Last lines of each log that contains an error.

    Logs that ended first come first, because they are nearest to the cause.
    """
    written = {file: file.stat().st_mtime for file in logs.glob(run_folder.LOG_PATTERN)}
    shown = 0
    for file in sorted(written, key=lambda file: written[file]):
        if written[file] < since or shown == _LOGS_SHOWN:
            continue
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()
        stalled = [number for number, line in enumerate(lines) if _STALLED.search(line)]
        marked = [number for number, line in enumerate(lines) if _TROUBLE.search(line)]
        if stalled:  # the stacks are in the lines after it
            shown += 1
            begin = stalled[-1]
            yield from [f"== {file}", *lines[begin : begin + _STACK_LINES_SHOWN], ""]
        elif marked:
            shown += 1
            end = marked[-1] + 3
            yield from [f"== {file}", *lines[max(0, end - _LINES_SHOWN) : end], ""]


def _heartbeat(output_dir: Path) -> dict[str, Any]:
    """Values of heartbeat.json. Missing values and values of another type get their defaults.

    A damaged file must not prevent a job from being requeued.
    """
    defaults: dict[str, Any] = {"time": 0.0, "phase": "starting", "checkpoint_step": 0}
    content = _json(output_dir / run_folder.HEARTBEAT)
    if not isinstance(content, dict):
        return defaults
    kinds: dict[str, Any] = {"time": (int, float), "phase": str, "checkpoint_step": int}
    usable = {name: content[name] for name in kinds if isinstance(content.get(name), kinds[name])}
    return defaults | usable


def _earlier(file: Path) -> list[dict[str, Any]]:
    """Attempts recorded in the file. Other entries are ignored."""
    entries = _json(file)
    names = {field.name for field in fields(Attempt)}
    entries = entries if isinstance(entries, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and entry.keys() == names]


def _json(file: Path) -> Any:
    """Content of a JSON file; None if it is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
