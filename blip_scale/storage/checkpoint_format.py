"""The format of our training checkpoints: files written, verified, committed, read in pieces.

This module knows no ranks and no network.

A checkpoint is a folder `step_00000100` with one safetensors file a rank (fp32 masters, optimizer
moments and momentum averages of its parameter slices), `shared.safetensors` (what all ranks hold
alike: the feature queues) and `manifest.json` (`Manifest`). Until all of it is on the disk the
folder is called `step_00000100.partial`. Every file says which elements of each parameter it holds,
so a checkpoint does not depend on the number of ranks or on the ZeRO stage that wrote it.

The manifest says which version of this format the checkpoint has (`FORMAT_VERSION`). Whoever
changes the layout, or the meaning of a field, raises the version.

Version 1: the manifest has no checksum. Checkpoints from before the version was written are read as
version 1.
Version 2: the manifest's last field is the checksum of everything before it. Later versions keep
this rule, so that a damaged version number is told from a newer version.
"""

from __future__ import annotations

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
"""Sizes of the network, in checkpoints that were converted and lie in no run's folder."""
MOMENTS = ("exp_avg", "exp_avg_sq")
_VERSION_KEY = "format_version"
_CHECKSUM = re.compile(r',\n "checksum": "([0-9a-f]{16})"\n\}\n?\Z')

FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
"""Name of a file inside of a checkpoint's folder: never a path."""


class UnknownVersionError(ValueError):
    """A checkpoint is of a version of the format that this code doesn't read."""


@checked_dataclass(frozen=True, config=ConfigDict(strict=True))
class Manifest:
    """What manifest.json says of a checkpoint."""

    step: int
    """Optimizer steps done."""
    world_size: int
    """Ranks that wrote it."""
    stage: int
    """ZeRO stage."""
    optimizer_steps: int
    """Updates that AdamW has made; fewer than `step` where updates were skipped."""
    parameters: dict[str, Annotated[int, Field(ge=0)]]
    """Elements of every parameter, by name."""
    files: dict[FileName, dict[str, Any]]
    """Size (`bytes`) and checksum (`xxh3`) of every file, by name."""
    position: dict[str, Any]
    """The run's past (`engine.run.History`); empty in a checkpoint that no run wrote."""
    task: dict[str, Any]
    """State of the task."""
    frozen: list[str] = field(default_factory=list)
    """Parameters that don't train; early checkpoints of runs without any lack the field."""

    def to_json(self) -> str:
        """The text of manifest.json, its checksum at the end."""
        text = json.dumps({_VERSION_KEY: FORMAT_VERSION, **asdict(self)}, indent=1)
        covered = text.removesuffix("\n}")
        return f'{covered},\n "checksum": "{_digest(covered)}"\n}}'

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and verify manifest.json.

        Raises:
            UnknownVersionError: another version of the format.
            ValueError: it is damaged.
        """
        checksum = _CHECKSUM.search(text)
        if checksum and _digest(text[: checksum.start()]) != checksum[1]:
            raise ValueError("its checksum isn't that of its content")
        try:
            content = json.loads(text)
        except RecursionError as error:
            raise ValueError("its values are nested too deep") from error
        names = [one.name for one in fields(cls)]
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
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"{place}: {first['msg']}") from error


def _digest(text: str) -> str:
    return xxhash.xxh3_64(text.encode()).hexdigest()


@dataclass(frozen=True)
class Content:
    """What goes into one file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def rank_file(rank: int) -> str:
    """Name of the file of a rank."""
    return f"rank_{rank:05d}.safetensors"


def committed(folder: Path) -> list[int]:
    """Steps of the committed checkpoints of a folder, oldest first."""
    return run_folder.steps(path.name for path in folder.glob("step_*"))


def committed_objects(names: Iterable[str]) -> list[int]:
    """Steps whose manifest is among the objects of an object storage, oldest first."""
    return run_folder.steps(name.removesuffix(f"/{MANIFEST}") for name in names)


def retained(candidates: Iterable[int], keep_last: int, keep_every: int | None) -> set[int]:
    """The steps that are kept: the newest, and the multiples of `keep_every`."""
    ordered = sorted(candidates)
    for_ever = {step for step in ordered if keep_every and step % keep_every == 0}
    return {*ordered[-keep_last:], *for_ever}


def check_vocabulary(source: Path, saved: Mapping[str, int], here: Mapping[str, int]) -> None:
    """Refuse a checkpoint of another tokenizer, which sizes of parameters alone would not explain.

    Args:
        source: the checkpoint, for the error.
        saved: number of elements of each of its parameters.
        here: number of elements of each parameter of the network that is to be filled.

    Raises:
        ValueError: the vocabularies are of different sizes.
    """
    tokens, wanted = _vocabulary_size(saved), _vocabulary_size(here)
    if tokens and wanted and tokens != wanted:
        raise ValueError(
            f"{source} was trained with a vocabulary of {tokens} tokens ([DEC] and [ENC] "
            f"included), the tokenizer here has {wanted}: give its own tokenizer as "
            "model.text.tokenizer, or --tokenizer of a command"
        )


def _vocabulary_size(sizes: Mapping[str, int]) -> int | None:
    """Rows of the word embeddings; None where the parameters hold none."""
    for name, numel in sizes.items():
        width = sizes.get(name.removesuffix("word.weight") + "norm.weight", 0)
        if name.endswith("embeddings.word.weight") and width:
            return numel // width
    return None


def write(folder: Path, contents: Mapping[str, Content]) -> dict[str, dict[str, Any]]:
    """Write files through to the disk; name -> size and checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    return {name: _write_file(folder / name, content) for name, content in contents.items()}


def _write_file(path: Path, content: Content) -> dict[str, Any]:
    # safetensors writes a file that it cannot read from no tensors and an empty dictionary.
    save_file(content.tensors, path, content.metadata or None)
    files.follow_umask(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "xxh3": _checksum(path)}


def is_intact(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file has the size and the checksum of its manifest."""
    return path.stat().st_size == entry.get("bytes") and _checksum(path) == entry.get("xxh3")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_64)  # type: ignore[arg-type]
    return digest.hexdigest()


def write_manifest(folder: Path, manifest: str) -> None:
    """Write manifest.json through to the disk."""
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(manifest)
        file.flush()
        os.fsync(file.fileno())


def commit(partial: Path, final: Path, manifest: str) -> None:
    """Write the manifest and give the folder its final name: from here on the checkpoint exists."""
    write_manifest(partial, manifest)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    directory = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it can't be read, or is of another version of the format.
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
            raise FileNotFoundError(
                f"{file} is missing; a checkpoint is whole with the files of all ranks"
            )
        if not is_intact(file, entry):
            raise ValueError(f"{file} is damaged: size or checksum isn't that of {MANIFEST}")


class Reader:
    """Reads any elements of any parameter out of the files of some ranks."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = [safe_open(file, "pt") for file in files]
        self._starts = [
            {name: int(start) for name, start in (file.metadata() or {}).items()}
            for file in self._files
        ]

    def names(self, key: str) -> set[str]:
        """Names of the parameters of which the files hold `key` (see `read`)."""
        keys = {name for file in self._files for name in file.keys()}  # noqa: SIM118
        return {name.removeprefix(f"{key}/") for name in keys if name.startswith(f"{key}/")}

    def whole(self, key: str, name: str, numel: int) -> Tensor:
        """All elements [numel] of a parameter: mapped from the file where one file holds them all,
        else copied together (see `read`).

        Raises:
            ValueError: the files do not hold all of it.
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
            key: weight, momentum, or one of `MOMENTS`.
            name: of the parameter.
            start: index of the first element of the flattened parameter.
            target: where it goes.

        Raises:
            ValueError: the files do not hold all of it.
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
                "changed by hand. Restore them, or take another checkpoint."
            )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
