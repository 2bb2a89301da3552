"""A look at a sample before the whole is converted: what it holds, what would be rejected, and what
it will take.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from blip_scale.data.conversion.pairs import Chunk, RawPair, Reject
from blip_scale.data.conversion.screening import Rules, screen

_SPREAD = 16  # chunks that are looked into
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclass
class Survey:
    """Of the sample."""

    read: int = 0
    written: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    figures: dict[str, list[int]] = field(default_factory=dict)
    """By name: one value for each image (`width`, ...) or caption (`words`, ...)."""
    image_bytes: int = 0
    seconds: float = 0.0
    """Of one process."""
    whole_pairs: int = 0
    """Estimated number of pairs in the whole input, exact where the input is a list."""

    @property
    def whole_bytes(self) -> int:
        """Of all shards, estimated."""
        return round(self.image_bytes / max(1, self.read) * self.whole_pairs)

    def whole_seconds(self, processes: int) -> float:
        """Of the whole conversion, estimated."""
        return self.seconds / max(1, self.read) * self.whole_pairs / processes

    def quantiles(self) -> dict[str, list[int]]:
        """By figure, its QUANTILES."""
        return {
            name: [round(value) for value in np.quantile(values, QUANTILES)]
            for name, values in self.figures.items()
            if values
        }


def survey(
    chunks: Sequence[Chunk],
    rules: Rules,
    sample: int,
    count_tokens: Callable[[str], int] | None = None,
) -> Survey:
    """Read about `sample` pairs from chunks all over the input and screen them; nothing is written.

    `count_tokens` adds the captions' lengths in tokens to their lengths in words.
    """
    chosen = [chunks[i * len(chunks) // _SPREAD] for i in range(_SPREAD)]
    chosen = list({id(chunk): chunk for chunk in chosen}.values())
    found = Survey()
    found_bytes = 0
    start_s = time.perf_counter()
    for chunk in chosen:
        for one in islice(chunk.read(), -(-sample // len(chosen))):
            found.read += 1
            if isinstance(one, Reject):
                found.reasons[one.reason] += 1
                continue
            assert isinstance(one, RawPair), "sources don't screen their pairs themselves"
            found_bytes += one.stored_bytes or _image_bytes(one)
            record, rejects, _ = screen(one, rules)
            found.reasons.update(reject.reason for reject in rejects)
            if record is None:
                continue
            found.written += 1
            found.image_bytes += len(record.image)
            _add(found, "width", record.width)
            _add(found, "height", record.height)
            _add(found, "kilobytes", len(record.image) // 1000)
            _add(found, "captions", len(record.captions))
            for caption in record.captions:
                _add(found, "words", len(caption.split()))
                if count_tokens is not None:
                    _add(found, "tokens", count_tokens(caption))
    found.seconds = time.perf_counter() - start_s
    found.whole_pairs = _whole_pairs(chunks, found.read, found_bytes)
    return found


def _image_bytes(pair: RawPair) -> int:
    return len(pair.image) if isinstance(pair.image, bytes) else 0


def _add(found: Survey, name: str, value: int) -> None:
    found.figures.setdefault(name, []).append(value)


def _whole_pairs(chunks: Sequence[Chunk], read: int, found_bytes: int) -> int:
    """Counted where chunks know it, else by the size of the input and of the images seen."""
    known = sum(chunk.pairs or 0 for chunk in chunks)
    input_bytes = sum(chunk.input_bytes for chunk in chunks)
    return known + (round(input_bytes * read / found_bytes) if found_bytes else 0)
