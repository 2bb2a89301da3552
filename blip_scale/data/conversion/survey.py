"""A look at a sample before the whole is converted: what it holds, what would be rejected, and what
it will take.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from blip_scale.data.conversion.chunks import read_safely
from blip_scale.data.conversion.pairs import Chunk, Found, RawPair, Reject, Screened, Unused
from blip_scale.data.conversion.report import example_of
from blip_scale.data.conversion.screening import Rules, screen
from blip_scale.data.conversion.text_counts import count_text, tokenizer_of
from blip_scale.data.reading.probe import count_tokens

_SPREAD = 16  # chunks that are looked into
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclass
class Survey:
    """Of the sample."""

    read: int = 0
    written: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """The first reject of each reason."""
    unused: Counter[str] = field(default_factory=Counter)
    """What is there and is no pair, by kind."""
    text: Counter[str] = field(default_factory=Counter)
    """See `count_text`."""
    captions: list[str] = field(default_factory=list)
    """As they would be written."""
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

    def shown_captions(self, count: int = 5) -> list[str]:
        """Some captions, evenly over the sample."""
        shown = min(count, len(self.captions))
        return [self.captions[i * len(self.captions) // shown] for i in range(shown)]

    def quantiles(self) -> dict[str, list[int]]:
        """By figure, its QUANTILES."""
        return {
            name: [round(value) for value in np.quantile(values, QUANTILES)]
            for name, values in self.figures.items()
            if values
        }


def survey(chunks: Sequence[Chunk], rules: Rules, sample: int, tokenizer: str = "") -> Survey:
    """Read about `sample` pairs from chunks all over the input and screen them; nothing is written.

    `tokenizer` adds the captions' lengths in tokens, and how much of them it does not know.
    """
    if not chunks:
        raise ValueError("there is nothing to convert: the input is empty")
    chosen = [chunks[i * len(chunks) // _SPREAD] for i in range(_SPREAD)]
    chosen = list({id(chunk): chunk for chunk in chosen}.values())
    seen = Survey()
    seen_bytes = 0
    start_s = time.perf_counter()
    for chunk in chosen:
        for found in islice(read_safely(chunk), -(-sample // len(chosen))):
            if isinstance(found, RawPair):
                seen_bytes += found.stored_bytes or _image_bytes(found)
            _look_at(seen, found, rules, tokenizer)
    seen.seconds = time.perf_counter() - start_s
    seen.whole_pairs = _whole_pairs(chunks, seen.read, seen_bytes)
    return seen


def _look_at(seen: Survey, found: Found, rules: Rules, tokenizer: str) -> None:
    assert not isinstance(found, Screened), "sources don't screen their pairs themselves"
    if isinstance(found, Unused):
        seen.unused[found.kind] += found.count
        return
    seen.read += 1
    if isinstance(found, Reject):
        _count_rejects(seen, [found])
        return
    record, rejects, _ = screen(found, rules)
    _count_rejects(seen, rejects)
    if record is None:
        return
    seen.written += 1
    seen.captions += record.captions
    seen.image_bytes += len(record.image)
    seen.text += count_text(found, record, rules.max_words, tokenizer)
    figures = {
        "width": record.width,
        "height": record.height,
        "kilobytes": len(record.image) // 1000,
        "captions": len(record.captions),
    }
    for name, value in figures.items():
        _add(seen, name, value)
    for caption in record.captions:
        _add(seen, "words", len(caption.split()))
        if tokenizer:
            _add(seen, "tokens", count_tokens(tokenizer_of(tokenizer), caption)[0])


def _count_rejects(seen: Survey, rejects: Sequence[Reject]) -> None:
    for reject in rejects:
        seen.reasons[reject.reason] += 1
        seen.examples.setdefault(str(reject.reason), example_of(reject))


def _image_bytes(pair: RawPair) -> int:
    return len(pair.image) if isinstance(pair.image, bytes) else 0


def _add(seen: Survey, name: str, value: int) -> None:
    seen.figures.setdefault(name, []).append(value)


def _whole_pairs(chunks: Sequence[Chunk], read: int, seen_bytes: int) -> int:
    """Counted where chunks know it, else by the size of the input and of the images seen."""
    listed = sum(chunk.pairs or 0 for chunk in chunks)
    input_bytes = sum(chunk.input_bytes for chunk in chunks)
    return listed + (round(input_bytes * read / seen_bytes) if seen_bytes else 0)
