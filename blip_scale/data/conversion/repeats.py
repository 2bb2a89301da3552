"""Find repeated hashes, with little more memory than the hashes need."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_PARTITIONS = 16  # sorted one after the other, to save memory


def repeats(hashes: NDArray[np.uint64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Find hashes that are equal to an earlier hash.

    Args:
        hashes: uint64 [hashes].

    Returns:
        Two unsigned arrays [repeats]: the ascending positions of the repeated hashes, and for each
        of them the position of the first equal hash.
    """
    later, firsts = [], []
    partitions = hashes.view(np.uint8)[::8] % _PARTITIONS
    number = np.min_scalar_type(len(hashes))
    for partition in range(_PARTITIONS):
        places = np.flatnonzero(partitions == partition)
        places = places[np.argsort(hashes[places], kind="stable")]
        is_first = np.append(True, np.diff(hashes[places]) != 0)[: len(places)]
        heads = places[is_first][np.cumsum(is_first) - 1]
        later.append(places[~is_first].astype(number))
        firsts.append(heads[~is_first].astype(number))
    positions = np.concatenate(later)
    order = np.argsort(positions, kind="stable")
    return positions[order], np.concatenate(firsts)[order]
