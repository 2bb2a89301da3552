"""Check the size of /dev/shm, through which loader workers send batches.

Docker gives a container 64 MB of it by default.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from blip_scale.errors import RefusedInput

SHARED_MEMORY = Path("/dev/shm")
PREFETCHED_BATCHES = 4
"""Number of batches that a worker prefetches."""


def needed_bytes(workers: int, micro_batch: int, image_size: int, images: int = 1) -> int:
    """Bytes of all prefetched batches of one rank.

    Args:
        workers: number of loader processes.
        micro_batch: number of samples in a batch.
        image_size: side of the square images in pixels.
        images: number of images per sample.
    """
    batch = micro_batch * images * 3 * image_size**2
    return workers * (PREFETCHED_BATCHES + 1) * batch


def check_shared_memory(needed: int, ranks: int, folder: Path = SHARED_MEMORY) -> str:
    """Refuse a /dev/shm that is too small, because workers would crash when they send batches.

    Args:
        needed: bytes of one rank, from `needed_bytes`.
        ranks: number of ranks on this machine.
        folder: mount point of shared memory.

    Returns:
        A line for a report.

    Raises:
        RefusedInput: the folder is too small.
    """
    if not needed or not folder.is_dir():
        return "not used"
    size = shutil.disk_usage(folder).total
    total = needed * ranks
    report = f"{size / 2**20:.0f} MiB in {folder}, {total / 2**20:.0f} MiB for {ranks} rank(s)"
    if total > size:
        gib = -(-2 * total // 2**30)
        raise RefusedInput(
            f"{report}: loader workers would lose batches; start the container with "
            f"--shm-size={gib}g (or --ipc=host), or lower data.workers (0: no shared memory)"
        )
    return report


def ranks_here() -> int:
    """Number of ranks on this machine, from the launcher's environment variables."""
    for variable in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        value = os.environ.get(variable, "")
        if value.isdecimal():
            return int(value)
    return 1
