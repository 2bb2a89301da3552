"""manifest.json of a run: its inputs, its starts and its checkpoints."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

import blip_scale
from blip_scale import logs
from blip_scale.storage import checkpoint_format, files, run_folder

logger = logging.getLogger(__name__)

_PACKAGES = (
    "torch", "deepspeed", "transformers", "timm", "obstore", "flash-attn", "numpy",
    "pillow", "safetensors",
)  # fmt: skip


class RunManifest:
    """Record of a run over all its starts; only rank 0 writes it.

    `state` describes the newest start: recipe, deepspeed, code, packages and data (each stream with
    the hash of its index). `attempts` has one object per start, with the changes since the previous
    start (`changed`) and, if known, how it ended. `checkpoints` lists all committed checkpoints,
    including deleted ones: step, time, attempt and hash of the manifest.
    """

    def __init__(self, output_dir: Path, is_main: bool) -> None:
        """Read the record of earlier starts. If the file cannot be read, rename it."""
        self._file = output_dir / run_folder.RUN_MANIFEST
        self._is_main = is_main
        self._disk = files.Spared(f"manifest of the run in {self._file}")
        self._content: dict[str, Any] = {"state": {}, "attempts": [], "checkpoints": []}
        if is_main and self._file.exists():
            try:
                self._content = _content_of(self._file)
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                aside = self._file.with_suffix(".damaged")
                logger.warning("%s cannot be read (%s): renamed to %s", self._file, error, aside)
                with self._disk:
                    self._file.replace(aside)

    def begin(
        self, state: dict[str, Any], attempt: dict[str, Any], left: Mapping[str, Any]
    ) -> None:
        """Record a start. Warn of changed settings, code, packages and data.

        Args:
            state: sections of settings, JSON-able.
            attempt: facts about this start only.
            left: heartbeat of the previous start. It holds the last step if that start was killed.
        """
        if not self._is_main:
            return
        state, attempt = json.loads(logs.without_secrets(json.dumps([state, attempt])))
        attempts, before = self._content["attempts"], self._content["state"]
        changed = list(_differences(before, state)) if before else []
        for change in changed:
            logger.warning("changed since the previous start: %s", change)
        if attempts and attempts[-1]["ended"] is None:
            attempts[-1]["ended"] = {"why": "not known", "step": left.get("step")}
        self._content["state"] = state
        attempts.append({"time": _now(), **attempt, "changed": changed, "ended": None})
        self._write()

    def saved(self, step: int, checkpoint: Path) -> None:
        """Record a committed checkpoint."""
        if self._is_main:
            entry = {"step": step, "time": _now(), "attempt": len(self._content["attempts"]) - 1}
            self._content["checkpoints"].append(entry | fingerprint(checkpoint))
            self._write()

    def ended(self, step: int, why: str) -> None:
        """Record how this start ended."""
        if self._is_main:
            self._content["attempts"][-1]["ended"] = {"why": why, "step": step, "time": _now()}
            self._write()

    def _write(self) -> None:
        with self._disk:
            files.write_whole(self._file, json.dumps(self._content, indent=1) + "\n")


def _content_of(file: Path) -> dict[str, Any]:
    """Read and check a manifest.

    Raises:
        OSError, ValueError, KeyError, TypeError, RecursionError: the file cannot be read, or is not
            a manifest.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    for name, kind in {"state": dict, "attempts": list, "checkpoints": list}.items():
        if not isinstance(content[name], kind):
            raise ValueError(f"{name} is no {kind.__name__}")
    for attempt in content["attempts"]:
        attempt["ended"]
    return {name: content[name] for name in ("state", "attempts", "checkpoints")}


def fingerprint(checkpoint: Path) -> dict[str, str | None]:
    """Return the path of a checkpoint and the hash of its manifest, which holds all checksums."""
    try:
        manifest_hash = digest((checkpoint / checkpoint_format.MANIFEST).read_bytes())
    except OSError:
        manifest_hash = None
    return {"checkpoint": str(checkpoint), "manifest_xxh64": manifest_hash}


def digest(content: bytes) -> str:
    """Return the xxh64 hash as hexadecimal digits."""
    return xxhash.xxh64(content).hexdigest()


def software() -> dict[str, dict[str, Any]]:
    """Return the versions in use.

    Returns:
        `code`: version of this package, git commit and whether files differ from it (None outside a
        clone). `packages`: versions of Python and of the packages that compute (None: missing).
    """
    folder = Path(blip_scale.__file__).resolve().parent.parent
    commit = _git(folder, "rev-parse", "HEAD") if (folder / ".git").exists() else None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no") if commit else None
    packages: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    code = {
        "version": blip_scale.__version__,
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
    }
    return {"code": code, "packages": packages}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Yield `section.setting: old -> new` for every leaf that differs; streams match by name."""
    if isinstance(before, list) and isinstance(now, list) and _named(before) and _named(now):
        before = {entry["name"]: entry for entry in before}
        now = {entry["name"]: entry for entry in now}
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            inner = f"{name}.{key}" if name else key
            yield from _differences(before.get(key), now.get(key), inner)
    elif before != now:
        yield f"{name}: {json.dumps(before)} -> {json.dumps(now)}"


def _named(value: list[Any]) -> bool:
    return all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in value)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
