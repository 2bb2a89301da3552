"""Number of samples that each stream contributes to an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from blip_scale.config.recipe import DataRecipe, StreamRecipe


def samples_per_epoch(data: DataRecipe, sizes: Sequence[int]) -> list[int]:
    """Compute the number of samples that an epoch takes from each training stream.

    Args:
        data: the recipe's data settings.
        sizes: number of samples of each stream; captions for a stream with `repeat: captions`.

    Raises:
        ValueError: an epoch would take no sample of a stream.
    """
    if data.samples_per_epoch is not None:
        weights = [stream.weight or 0.0 for stream in data.streams]
        total = sum(weights)
        bounds = [round(data.samples_per_epoch * part / total) for part in accumulate(weights)]
        counts = [stop - start for start, stop in zip([0, *bounds], bounds, strict=False)]
    else:
        counts = [
            stream.samples_per_epoch or round(size * _repeats(stream))
            for stream, size in zip(data.streams, sizes, strict=True)
        ]
    for stream, size, count in zip(data.streams, sizes, counts, strict=True):
        if not count:
            raise ValueError(
                f"stream {stream.name!r}: an epoch takes none of its {size} samples: raise its "
                "repeat or weight, or leave it out"
            )
    return counts


def _repeats(stream: StreamRecipe) -> float:
    return stream.repeat if isinstance(stream.repeat, float) else 1.0


def describe(data: DataRecipe, sizes: Sequence[int], counts: Sequence[int]) -> str:
    """Describe the mixture in one line: share and number of passes per epoch of each stream."""
    total = sum(counts)
    return ", ".join(
        f"{stream.name} {count / total:.1%} ({count} = {count / size:.3g} x {size})"
        for stream, size, count in zip(data.streams, sizes, counts, strict=True)
    )
