"""Lock of an output folder: one run owns it, and a second run is refused."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from blip_scale.config import exit_codes
from blip_scale.errors import RefusedInput
from blip_scale.storage import files, run_folder

logger = logging.getLogger(__name__)

BEAT_S = 5.0
"""Seconds between two renewals of a lock's time stamp."""
STALE_S = 60.0
"""Seconds without a renewal after which a lock of another machine is stale."""


class RunLock:
    """A file in the output folder that names the run's host, process and job.

    A thread renews the file's time stamp, whatever the run does. A lock is stale, and taken over,
    if

    * its process ran on this machine and is gone,
    * it belongs to this SLURM job, and the job or its ranks were started again since, or
    * it was not renewed for `STALE_S` seconds. Only time stamps of the folder's file system are
      compared, so clocks of machines may differ.

    Only rank 0 holds a lock. If the launcher sets no ranks, every process believes that it is rank
    0, and all but the first are refused.
    """

    def __init__(self, output_dir: Path) -> None:
        """Take the lock.

        Raises:
            RefusedInput: another run holds it. The message names host, process and job.
        """
        self._file = output_dir / run_folder.LOCK
        self._draft = output_dir / f".{run_folder.LOCK}.{uuid.uuid4().hex}"
        self._disk = files.Spared(f"sign of life in {self._file}")
        self._ended = threading.Event()
        output_dir.mkdir(parents=True, exist_ok=True)
        self._text = json.dumps(_identity()) + "\n"
        self._draft.write_text(self._text, encoding="utf-8")
        try:
            while not self._take():
                self._remove_if_stale()
        finally:
            self._draft.unlink(missing_ok=True)
        threading.Thread(target=self._renew, name="lock", daemon=True).start()

    def release(self) -> None:
        """Remove the lock, unless another run has taken it over."""
        if not self._ended.is_set():
            self._ended.set()
            with self._disk:
                if self._is_held():
                    self._file.unlink()

    def _take(self) -> bool:
        """Link the draft to the lock's name, unless there is a lock. Atomic, also on NFS."""
        try:
            os.link(self._draft, self._file)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                with self._file.open("x", encoding="utf-8") as file:
                    file.write(self._text)
            except FileExistsError:
                return False
        return True

    def _remove_if_stale(self) -> None:
        """Remove the present lock if it is stale.

        Raises:
            RefusedInput: the lock belongs to a live run.
        """
        text = self._read()
        if text is None:
            return
        holder = _parsed(text)
        is_alive = _is_alive(holder)
        if is_alive is None:
            is_alive = not self._falls_silent(text, holder)
        if is_alive:
            raise RefusedInput(
                f"{self._file.parent} belongs to a run that is still running "
                f"({_described(holder)}): "
                f"give another output_dir, or end that run. If there is none, remove {self._file}"
            )
        aside = self._draft.with_suffix(".stale")
        with contextlib.suppress(FileNotFoundError):
            self._file.rename(aside)
            if aside.read_text(encoding="utf-8", errors="replace") != text:
                # Another start took over first, and this is its lock: put it back.
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self._file)
            else:
                logger.warning("took over the lock of a run that ended (%s)", _described(holder))
            aside.unlink()

    def _falls_silent(self, text: str, holder: dict[str, Any]) -> bool:
        """Wait until the lock is stale or renewed. Returns whether it is stale or gone."""
        before_s: float | None = None
        while self._read() == text:
            age_s = self._age_s()
            if age_s is None or age_s >= STALE_S:
                return True
            if before_s is None:
                logger.warning(
                    "%s is locked (%s): waiting up to %.0f s for its heartbeat",
                    self._file.parent, _described(holder), STALE_S - age_s,
                )  # fmt: skip
            elif age_s < before_s:
                return False
            before_s = age_s
            time.sleep(0.5)
        return self._read() is None

    def _age_s(self) -> float | None:
        """Seconds since the lock's last renewal, by the clock of its file system."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._draft)
            return self._draft.stat().st_mtime - self._file.stat().st_mtime
        return None

    def _renew(self) -> None:
        while not self._ended.wait(BEAT_S):
            with self._disk:
                text = self._read()
                if text is None:  # removed by hand, or being taken over: look again later
                    continue
                if text != self._text:
                    logger.error(
                        "%s was taken over by another run, because this one sent no heartbeat; "
                        "stopping",
                        self._file,
                    )
                    logging.shutdown()
                    os._exit(exit_codes.FAILED)
                os.utime(self._file)

    def _is_held(self) -> bool:
        return self._read() == self._text

    def _read(self) -> str | None:
        try:
            return self._file.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None


def _identity() -> dict[str, Any]:
    """Host, process and job of this run, as a lock names them."""
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "pid": process.pid,
        "started": process.create_time(),
        "namespace": _namespace(),
        "job_id": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "launch": os.environ.get("BLIP_SCALE_LAUNCH", "0"),
    }


def _parsed(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _described(holder: dict[str, Any]) -> str:
    job = f", job {holder['job_id']}" if holder.get("job_id") else ""
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}{job}"


def _is_alive(holder: dict[str, Any]) -> bool | None:
    """Whether the holder runs; None if this machine can't tell."""
    here = _identity()
    is_same_job = holder.get("job_id") is not None and holder["job_id"] == here["job_id"]
    starts = ("restart", "launch")
    if is_same_job and any(holder.get(name, "0") != here[name] for name in starts):
        return False
    if (holder.get("host"), holder.get("namespace")) != (here["host"], here["namespace"]):
        return None
    try:
        process = psutil.Process(int(holder["pid"]))
        is_it = abs(process.create_time() - float(holder["started"])) < 1
        return is_it and process.status() != psutil.STATUS_ZOMBIE
    except (KeyError, TypeError, ValueError):
        return None
    except psutil.NoSuchProcess:
        return False


def _namespace() -> str:
    """Namespace of process ids. Containers may share a host name, but not this namespace."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
