"""Location of checkpoints: a shared folder or one on each node, and optionally object storage."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blip_scale.config.recipe import Recipe
from blip_scale.config.settings import expand
from blip_scale.engine import collectives
from blip_scale.engine.checkpoints.background import attempt, errors_of
from blip_scale.storage import run_folder
from blip_scale.storage.free_space import is_disk_full
from blip_scale.storage.objects import ObjectFolder


@dataclass(frozen=True)
class Place:
    """Location of a run's checkpoints, seen from one rank."""

    folder: Path
    remote: ObjectFolder | None
    """Object storage that committed checkpoints are copied to."""
    rank: int
    sharers: tuple[int, ...]
    """Ranks that see the same `folder`, this one included: all, or those of its node."""
    world_size: int

    @property
    def is_shared(self) -> bool:
        """Whether all ranks see one folder."""
        return len(self.sharers) == self.world_size

    @property
    def is_first(self) -> bool:
        """Whether this rank does the work that only one rank per folder must do."""
        return self.rank == self.sharers[0]

    def share(self, names: Sequence[str]) -> list[str]:
        """This rank's share of files that the ranks of the folder divide among themselves."""
        return list(names[self.sharers.index(self.rank) :: len(self.sharers)])


def open_place(recipe: Recipe) -> Place:
    """The location that the recipe gives. Call it on all ranks.

    Raises:
        ValueError: the folder can't be written, or the object storage can't be opened.
        OSError: the disk of the folder has no room, or no inode.
    """
    stated = recipe.checkpoint.folder
    location = expand(stated, "checkpoint.folder") if stated else None
    folder, remote = Path(recipe.output_dir) / run_folder.CHECKPOINTS, None
    if location and "://" in location:
        remote = ObjectFolder(location, recipe.checkpoint.retry_s)
    elif location:
        folder = Path(location)
    return Place(folder, remote, collectives.rank(), _sharers(folder), collectives.world_size())


def _sharers(folder: Path) -> tuple[int, ...]:
    """The ranks that see the same folder as this one."""
    token = collectives.all_gather_objects(uuid.uuid4().hex)[0]
    marker = folder / f".seen_{token}"

    def mark() -> str:
        """Make the folder and the marker. Returns the problem of a full disk."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if collectives.rank() == 0:
                marker.touch()
        except OSError as error:
            if not is_disk_full(error):
                raise
            return str(error)
        return ""

    outcomes = collectives.all_gather_objects(attempt(mark, collectives.rank()))
    if errors := errors_of(outcomes):
        raise ValueError(f"no checkpoint can be written to {folder}: {'; '.join(errors)}")
    if full := [outcome.value for outcome in outcomes if outcome.value]:
        raise OSError(f"no checkpoint can be written to {folder}; free some space there: {full[0]}")
    here = "with rank 0" if marker.exists() else socket.gethostname()
    everywhere = collectives.all_gather_objects(here)
    if collectives.rank() == 0:
        marker.unlink()
    return tuple(rank for rank, there in enumerate(everywhere) if there == here)
