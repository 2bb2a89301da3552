"""Requeue a SLURM job whose srun has ended, or stop it: `requeue.py EXIT_CODE OUTPUT_DIR`.

slurm/train.sh calls it at the end of the batch script. Exit codes of srun:

- 0: the run is done.
- 75: the run stopped on request. The job is requeued.
- 2: the input was refused. The job stops.
- Others: a failure. The job is requeued. But after MAX_FAILURES failures (environment variable,
  default 3) without a newer checkpoint in between, the job stops and writes
  OUTPUT_DIR/failure_report.txt.
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
    """One start of a job, from the start of its srun to the end."""

    job: str
    restart: int
    """Number of earlier starts of the job."""
    exit_code: int
    failed: bool
    checkpoint_step: int
    """Step of the newest committed checkpoint at the end; 0 without a checkpoint."""
    nodes: str
    ended: float
    """Unix time."""
    seconds: int


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return the exit code of the batch script."""
    options = _parser().parse_args(arguments)
    if options.exit_code == exit_codes.DONE:
        (options.output_dir / run_folder.FAILURE_REPORT).unlink(missing_ok=True)
        print("the run is done")
        return exit_codes.DONE
    job = _job(os.environ["SLURM_JOB_ID"])
    if job.get("JobState") != "RUNNING" and job.get("Reason") != "TimeLimit":
        # The job was cancelled, or SLURM requeued it after preemption or the failure of a node.
        print(f"not requeued here: SLURM has the job as {job.get('JobState', 'unknown')}")
        return options.exit_code
    try:
        attempts = note_attempt(options.output_dir, options.exit_code, options.seconds)
    except OSError as error:  # without a count of failures the job might be requeued forever
        print(f"not requeued: can't record this failure in {options.output_dir}: {error}")
        return options.exit_code
    last, limit = attempts[-1], int(os.environ.get("MAX_FAILURES", "3"))
    failures = failures_without_progress(attempts)
    print(
        f"attempt {last.restart} ended with exit code {last.exit_code} after {last.seconds} s; "
        f"newest checkpoint: step {last.checkpoint_step}"
    )
    if last.exit_code == exit_codes.REFUSED and not last.failed:
        print("not requeued: the input was refused (see above); fix it and submit again")
    elif last.failed and failures >= limit:
        report = options.output_dir / run_folder.FAILURE_REPORT
        report.write_text(_report(attempts, failures, options.output_dir, job), encoding="utf-8")
        print(f"not requeued: failed {failures} times without a newer checkpoint; see {report}")
    elif job.get("Requeue") == "0":
        print("not requeued: the job has Requeue=0; submit again to resume")
    else:
        return _requeue(last)
    return options.exit_code


def note_attempt(output_dir: Path, exit_code: int, seconds: int) -> list[Attempt]:
    """Add this attempt to OUTPUT_DIR/attempts.json. Returns this job's attempts, oldest first."""
    file = output_dir / run_folder.ATTEMPTS
    heartbeat = _heartbeat(output_dir)
    now = time.time()
    began = heartbeat["time"] >= now - seconds and heartbeat["phase"] != "starting"
    # After the start of the training, code 2 is a failure.
    refused = exit_code == exit_codes.REFUSED and not began
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
    """Step of the newest committed checkpoint; 0 without a checkpoint.

    It is read from the folders in OUTPUT_DIR and, as checkpoints may lie elsewhere, from the
    heartbeat.
    """
    folders = (output_dir / run_folder.CHECKPOINTS).glob("*")
    steps = run_folder.steps(path.name for path in folders)
    return max([0, *steps, int(_heartbeat(output_dir)["checkpoint_step"])])


def failures_without_progress(attempts: list[Attempt]) -> int:
    """Number of failures since the last attempt that made a newer checkpoint."""
    newest, count = -1, 0
    for attempt in attempts:
        if attempt.checkpoint_step > newest:
            newest, count = attempt.checkpoint_step, 0
        count += attempt.failed
    return count


def _requeue(last: Attempt) -> int:
    """Requeue the job. SLURM ends this script meanwhile."""
    print(f"requeued: resumes at step {last.checkpoint_step}", flush=True)
    done = subprocess.run(["scontrol", "requeue", last.job], check=False)
    if done.returncode:
        print("scontrol could not requeue the job; submit again to resume")
        return last.exit_code
    time.sleep(60)
    return exit_codes.DONE


def _job(job_id: str) -> dict[str, str]:
    """SLURM's fields of the job: JobState, Reason, Requeue, StdOut ..."""
    command = ["scontrol", "show", "job", "--oneliner", job_id]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return dict(re.findall(r"(\w+)=(\S+)", shown))


def _report(attempts: list[Attempt], failures: int, output_dir: Path, job: dict[str, str]) -> str:
    """Text of the failure report, for the search of the cause."""
    last = attempts[-1]
    lines = [
        f"Job {last.job} ({job.get('JobName', '?')}) was stopped: it failed {failures} times "
        f"without a checkpoint newer than step {last.checkpoint_step}.",
        "Fix the cause and submit again: the run resumes at that step.",
        "",
        f"{'attempt':>7}  {'ended':19}  {'seconds':>7}  {'code':>4}  {'checkpoint':>10}  nodes",
    ]
    for attempt in attempts:
        ended = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.ended))
        lines.append(
            f"{attempt.restart:7}  {ended}  {attempt.seconds:7}  {attempt.exit_code:4}  "
            f"{attempt.checkpoint_step:10}  {attempt.nodes}"
        )
    heartbeat = _json(output_dir / run_folder.HEARTBEAT)
    lines += ["", f"Last heartbeat: {json.dumps(heartbeat)}"] if heartbeat else []
    logs = output_dir / run_folder.LOGS
    lines += ["", f"Log of the job: {job.get('StdOut', '?')}", f"Logs: {logs}", ""]
    lines += _last_words(logs, last.ended - last.seconds)
    return "\n".join(lines) + "\n"


def _last_words(logs: Path, since: float) -> Iterator[str]:
    """Last lines of the logs that hold an error.

    Logs that stopped first come first, as they are nearest to the cause.
    """
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
    """Values of heartbeat.json. Values that are missing or of another type get their defaults.

    A damaged file must not keep a job from being requeued.
    """
    defaults: dict[str, Any] = {"time": 0.0, "phase": "starting", "checkpoint_step": 0}
    content = _json(output_dir / run_folder.HEARTBEAT)
    if not isinstance(content, dict):
        return defaults
    kinds: dict[str, Any] = {"time": (int, float), "phase": str, "checkpoint_step": int}
    usable = {name: content[name] for name in kinds if isinstance(content.get(name), kinds[name])}
    return defaults | usable


def _earlier(file: Path) -> list[dict[str, Any]]:
    """Attempts that the file holds. Other entries are ignored."""
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Requeue a job, or stop it with a report.")
    parser.add_argument("exit_code", type=int, help="exit code of srun")
    parser.add_argument("output_dir", type=Path, help="folder of the run")
    parser.add_argument("--seconds", type=int, default=0, help="duration of the attempt")
    return parser


if __name__ == "__main__":
    sys.exit(main())
