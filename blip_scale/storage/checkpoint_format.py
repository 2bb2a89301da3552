"""Training checkpoint format: write, verify, commit and read checkpoints.

This module depends on neither ranks nor the network.

A checkpoint is a folder `step_00000100` with these files:

- one safetensors file per rank: fp32 masters, optimizer moments and momentum averages of its
  parameter slices;
- `shared.safetensors`: tensors that are equal on all ranks, the feature queues;
- `manifest.json` (`Manifest`).

The folder is called `step_00000100.partial` until all files are on the disk. Every file records
which elements of each parameter it holds, so a checkpoint can be loaded with any number of ranks
and any ZeRO stage.

The manifest holds the version of the format (`FORMAT_VERSION`). Raise the version when the layout
or the meaning of a field changes.

Version 1: the manifest has no checksum. A checkpoint without a version number is version 1.
Version 2: the last field of the manifest is the checksum of everything before it. Later versions
must keep this rule, which distinguishes a damaged version number from a newer version.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import xxhash
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from blip_scale.storage import files, run_folder

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SHARED = "shared.safetensors"
NETWORK = "network.json"
"""Sizes of the network. Only in converted checkpoints, which are not in the folder of a run."""
MOMENTS = ("exp_avg", "exp_avg_sq")
_VERSION_KEY = "format_version"
_CHECKSUM = re.compile(r',\n "checksum": "([0-9a-f]{16})"\n\}\n?\Z')

FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
"""Name of a file in a checkpoint's folder; never a path."""


class UnknownVersionError(ValueError):
    """The checkpoint has a format version that this code does not read."""


@checked_dataclass(frozen=True, config=ConfigDict(strict=True))
class Manifest:
    """Content of manifest.json."""

    step: int
    """Number of completed optimizer steps."""
    world_size: int
    """Number of ranks that wrote the checkpoint."""
    stage: int
    """ZeRO stage."""
    optimizer_steps: int
    """Number of updates made by AdamW; fewer than `step` if updates were skipped."""
    parameters: dict[str, Annotated[int, Field(ge=0)]]
    """Parameter name -> number of elements."""
    files: dict[FileName, dict[str, Any]]
    """File name -> size (`bytes`) and checksum (`xxh3`)."""
    position: dict[str, Any]
    """History of the run (`engine.run.History`); empty in a converted checkpoint."""
    task: dict[str, Any]
    """State of the task."""
    frozen: list[str] = field(default_factory=list)
    """Names of the parameters that are not trained. Early checkpoints may lack this field."""

    def to_json(self) -> str:
        """Text of manifest.json, with the checksum as its last field."""
        text = json.dumps({_VERSION_KEY: FORMAT_VERSION, **asdict(self)}, indent=1)
        covered = text.removesuffix("\n}")
        return f'{covered},\n "checksum": "{_digest(covered)}"\n}}'

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and verify manifest.json.

        Raises:
            UnknownVersionError: the version of the format is not supported.
            ValueError: the text is damaged.
        """
        checksum = _CHECKSUM.search(text)
        if checksum and _digest(text[: checksum.start()]) != checksum[1]:
            raise ValueError("its checksum does not match its content")
        try:
            content = json.loads(text)
        except RecursionError as error:
            raise ValueError("its values are nested too deep") from error
        names = [item.name for item in fields(cls)]
        if not isinstance(content, dict):
            raise ValueError(f"expected an object with {', '.join(names)}")
        version = content.pop(_VERSION_KEY, 1)
        if not checksum and version != 1:
            raise ValueError("it lacks its checksum")
        if version not in (1, FORMAT_VERSION):
            raise UnknownVersionError(
                f"the checkpoint has format version {version}, this blip_scale reads versions 1 "
                f"to {FORMAT_VERSION}: update blip_scale"
            )
        content.pop("checksum", None)
        missing = [name for name in names if name not in content and name != "frozen"]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        surplus = sorted(content.keys() - set(names))
        if surplus:
            raise ValueError(f"it has the unknown field {', '.join(surplus)}")
        try:
            return cls(**content)
        except ValidationError as error:
            first = error.errors()[0]
            field_path = ".".join(map(str, first["loc"]))
            raise ValueError(f"{field_path}: {first['msg']}") from error


def _digest(text: str) -> str:
    return xxhash.xxh3_64(text.encode()).hexdigest()


@dataclass(frozen=True)
class Content:
    """Content of one safetensors file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def rank_file(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank_{rank:05d}.safetensors"


def committed(folder: Path) -> list[int]:
    """Steps of the committed checkpoints in a folder, oldest first."""
    return run_folder.steps(path.name for path in folder.glob("step_*"))


def committed_objects(names: Iterable[str]) -> list[int]:
    """Steps whose manifest is among the names of objects in a bucket, oldest first."""
    return run_folder.steps(name.removesuffix(f"/{MANIFEST}") for name in names)


def retained(candidates: Iterable[int], keep_last: int, keep_every: int | None) -> set[int]:
    """Steps to keep: the newest `keep_last`, and the multiples of `keep_every`."""
    ordered = sorted(candidates)
    permanent = {step for step in ordered if keep_every and step % keep_every == 0}
    return {*ordered[-keep_last:], *permanent}


def remove(path: Path) -> None:
    """Remove a checkpoint's folder, or a file or link in its place. The target of a link is kept.

    Raises:
        OSError: the path can't be removed.
    """
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.exists():
        shutil.rmtree(path)


def check_vocabulary(source: Path, saved: Mapping[str, int], here: Mapping[str, int]) -> None:
    """Refuse a checkpoint that was trained with another tokenizer.

    The mismatch of parameter sizes that follows later does not show the cause.

    Args:
        source: the checkpoint, for the error.
        saved: parameter name -> number of elements in the checkpoint.
        here: parameter name -> number of elements in the network to load.

    Raises:
        ValueError: the vocabularies have different sizes.
    """
    tokens, wanted = _vocabulary_size(saved), _vocabulary_size(here)
    if tokens and wanted and tokens != wanted:
        raise ValueError(
            f"{source} was trained with a vocabulary of {tokens} tokens ([DEC] and [ENC] "
            f"included), but this tokenizer has {wanted}: set model.text.tokenizer, or the option "
            "--tokenizer, to the tokenizer of the checkpoint"
        )


def _vocabulary_size(sizes: Mapping[str, int]) -> int | None:
    """Number of word embeddings, or None if the parameters include none."""
    for name, numel in sizes.items():
        width = sizes.get(name.removesuffix("word.weight") + "norm.weight", 0)
        if name.endswith("embeddings.word.weight") and width:
            return numel // width
    return None


def write(folder: Path, contents: Mapping[str, Content]) -> dict[str, dict[str, Any]]:
    """Write files and sync them to the disk.

    Returns:
        file name -> size and checksum, as in `Manifest.files`.
    """
    with contextlib.suppress(OSError):
        folder.unlink()  # a file or a link in its place; fails for a folder
    folder.mkdir(parents=True, exist_ok=True)
    return {name: _write_file(folder / name, content) for name, content in contents.items()}


def _write_file(path: Path, content: Content) -> dict[str, Any]:
    # Without tensors, safetensors can't read a file that it wrote with an empty metadata dict.
    save_file(content.tensors, path, content.metadata or None)
    files.follow_umask(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "xxh3": _checksum(path)}


def is_intact(path: Path, entry: Mapping[str, Any]) -> bool:
    """Return True if a file has the size and checksum of its manifest entry."""
    return path.stat().st_size == entry.get("bytes") and _checksum(path) == entry.get("xxh3")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_64)  # type: ignore[arg-type]
    return digest.hexdigest()


def write_manifest(folder: Path, manifest: str) -> None:
    """Write manifest.json and sync it to the disk."""
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(manifest)
        file.flush()
        os.fsync(file.fileno())


def commit(partial: Path, final: Path, manifest: str) -> None:
    """Write the manifest and rename the folder to its final name, which commits the checkpoint."""
    write_manifest(partial, manifest)
    remove(final)
    partial.rename(final)
    directory = os.open(final.parent, os.O_RDONLY)  # its fsync makes the rename durable
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        ValueError: the manifest can't be read, or its format version is not supported.
    """
    file = folder / MANIFEST
    try:
        return Manifest.from_json(file.read_text(encoding="utf-8"))
    except UnknownVersionError as error:
        raise UnknownVersionError(f"{folder}: {error}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} can't be read: {error}") from error


def verify(folder: Path, manifest: Manifest) -> None:
    """Check size and checksum of every file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    for name, entry in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; a checkpoint needs the files of all ranks")
        if not is_intact(file, entry):
            raise ValueError(f"{file} is damaged: size or checksum differs from {MANIFEST}")


def _start_indices(metadata: Mapping[str, str] | None) -> dict[str, int]:
    """Parameter name -> index of the first element that a file holds."""
    return {name: int(start) for name, start in (metadata or {}).items()}


class Reader:
    """Reads any range of elements of any parameter from the files of several ranks."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = [safe_open(file, "pt") for file in files]
        self._starts = [_start_indices(file.metadata()) for file in self._files]

    def names(self, key: str) -> set[str]:
        """Names of the parameters for which the files hold `key` (see `read`)."""
        keys = {name for file in self._files for name in file.keys()}  # noqa: SIM118
        return {name.removeprefix(f"{key}/") for name in keys if name.startswith(f"{key}/")}

    def whole(self, key: str, name: str, numel: int) -> Tensor:
        """Read all elements of a parameter, as a tensor [numel].

        The tensor is memory-mapped if one file holds all elements, else copied from several files.

        Raises:
            ValueError: the files do not hold all elements.
        """
        for file, starts in zip(self._files, self._starts, strict=True):
            if name in starts and file.get_slice(f"{key}/{name}").get_shape() == [numel]:
                return file.get_tensor(f"{key}/{name}")
        target = torch.empty(numel)
        self.read(key, name, 0, target)
        return target

    def read(self, key: str, name: str, start: int, target: Tensor) -> None:
        """Fill `target` [numel] with elements [start, start + numel) of parameter `name`.

        Args:
            key: "weight", "momentum", or one of `MOMENTS`.
            name: name of the parameter.
            start: index of the first element in the flattened parameter.
            target: tensor to fill.

        Raises:
            ValueError: the files do not hold all elements.
        """
        missing, stop = target.numel(), start + target.numel()
        for file, starts in zip(self._files, self._starts, strict=True):
            if name not in starts:
                continue
            piece, begin = file.get_slice(f"{key}/{name}"), starts[name]
            low, high = max(start, begin), min(stop, begin + piece.get_shape()[0])
            if low < high:
                target[low - start : high - start] = piece[low - begin : high - begin]
                missing -= high - low
        if missing:
            raise ValueError(
                f"the checkpoint lacks {missing} elements of {key}/{name}: its files were "
                "changed by hand; restore them, or use another checkpoint"
            )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, by name."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
