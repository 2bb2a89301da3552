"""The files of a checkpoint: written, verified, committed, read in pieces; no rank knows another
here.

A checkpoint is a folder `step_00000100` with one safetensors file a rank (fp32 masters, optimizer
moments and momentum averages of its shards), `shared.safetensors` (what all ranks hold alike: the
feature queues) and `manifest.json` (sizes and checksums of the files, and the state of the run).
Until all of it is on the disk the folder is called `step_00000100.partial`. Every file says which
elements of each parameter it holds, so a checkpoint does not depend on the number of ranks or on
the ZeRO stage that wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "manifest.json"
SHARED = "shared.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
_NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class Content:
    """What goes into one file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def folder_name(step: int) -> str:
    """Name of the folder of a step."""
    return f"step_{step:08d}"


def rank_file(rank: int) -> str:
    """Name of the file of a rank."""
    return f"rank_{rank:05d}.safetensors"


def steps(names: Iterable[str]) -> list[int]:
    """Steps of the checkpoints among some names of folders, oldest first."""
    return sorted({int(match[1]) for name in names if (match := _NAME.fullmatch(name))})


def committed(folder: Path) -> list[int]:
    """Steps of the committed checkpoints of a folder, oldest first."""
    return steps(path.name for path in folder.glob("step_*"))


def committed_objects(names: Iterable[str]) -> list[int]:
    """Steps whose manifest is among the objects of an object storage, oldest first."""
    return steps(name.removesuffix(f"/{MANIFEST}") for name in names)


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
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "xxh3": _checksum(path)}


def is_intact(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file has the size and the checksum of its manifest."""
    return path.stat().st_size == entry["bytes"] and _checksum(path) == entry["xxh3"]


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_64)  # type: ignore[arg-type]
    return digest.hexdigest()


def commit(partial: Path, final: Path, manifest: str) -> None:
    """Write the manifest and give the folder its final name: from here on the checkpoint exists."""
    with (partial / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(manifest)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    directory = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def parse_manifest(text: str) -> dict[str, Any]:
    """The manifest as an object.

    Raises:
        ValueError: it is not whole.
    """
    manifest = json.loads(text)
    keys = ("step", "world_size", "stage", "optimizer_steps", "parameters", "files")
    if not isinstance(manifest, dict) or not all(key in manifest for key in keys):
        raise ValueError(f"expected an object with {', '.join(keys)}")
    return manifest


class Reader:
    """Reads any stretch of any parameter out of the files of some ranks."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = [safe_open(file, "pt") for file in files]
        self._starts = [
            {name: int(start) for name, start in (file.metadata() or {}).items()}
            for file in self._files
        ]

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
                "changed by hand. Take another output_dir."
            )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
