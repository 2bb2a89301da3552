"""Dry run of a conversion: estimate content, rejects, size and time from a sample."""

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
from blip_scale.data.tokenizer import count_tokens

_SPREAD = 16  # number of chunks that are sampled
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclass
class Survey:
    """Statistics of a sample of the input."""

    read: int = 0
    written: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """First reject for each reason."""
    unused: Counter[str] = field(default_factory=Counter)
    """Number of items that are not pairs, by kind."""
    text: Counter[str] = field(default_factory=Counter)
    """Counts from `count_text`."""
    captions: list[str] = field(default_factory=list)
    """Captions as they would be written."""
    roles: Counter[str] = field(default_factory=Counter)
    """Number of captions by role; empty if the source has no roles."""
    figures: dict[str, list[int]] = field(default_factory=dict)
    """Values by name, one per image (`width`, ...) or per caption (`words`, ...)."""
    image_bytes: int = 0
    seconds: float = 0.0
    """Time in which one process read the sample, in seconds."""
    whole_pairs: int = 0
    """Estimated number of pairs in the whole input; exact if the input is a list."""

    @property
    def whole_bytes(self) -> int:
        """Estimated size of all shards."""
        return round(self.image_bytes / max(1, self.read) * self.whole_pairs)

    def whole_seconds(self, processes: int) -> float:
        """Return the estimated time of the whole conversion in seconds."""
        return self.seconds / max(1, self.read) * self.whole_pairs / processes

    def shown_captions(self, count: int = 5) -> list[str]:
        """Return up to `count` captions, spread evenly over the sample."""
        shown = min(count, len(self.captions))
        return [self.captions[i * len(self.captions) // shown] for i in range(shown)]

    def quantiles(self) -> dict[str, list[int]]:
        """Return the QUANTILES of every figure."""
        quantiles = {}
        for name, values in self.figures.items():
            if values:
                quantiles[name] = [round(value) for value in np.quantile(values, QUANTILES)]
        return quantiles


def survey(chunks: Sequence[Chunk], rules: Rules, sample: int, tokenizer: str = "") -> Survey:
    """Read and screen pairs from chunks spread over the input, without writing anything.

    Args:
        chunks: the input.
        rules: rules for screening.
        sample: approximate number of pairs to read.
        tokenizer: tokenizer that counts tokens and unknown tokens; "" to count none.

    Raises:
        ValueError: the input is empty.
    """
    if not chunks:
        raise ValueError("there is nothing to convert: the input is empty")
    chosen = [chunks[i * len(chunks) // _SPREAD] for i in range(_SPREAD)]
    chosen = list({id(chunk): chunk for chunk in chosen}.values())
    seen = Survey()
    seen_bytes = 0
    start_s = time.perf_counter()
    for chunk in chosen:
        for item in islice(read_safely(chunk), -(-sample // len(chosen))):
            if isinstance(item, RawPair):
                seen_bytes += item.stored_bytes or _image_bytes(item)
            _add_item(seen, item, rules, tokenizer)
    seen.seconds = time.perf_counter() - start_s
    seen.whole_pairs = _whole_pairs(chunks, seen.read, seen_bytes)
    return seen


def _add_item(seen: Survey, item: Found, rules: Rules, tokenizer: str) -> None:
    assert not isinstance(item, Screened), "sources don't screen their pairs themselves"
    if isinstance(item, Unused):
        seen.unused[item.kind] += item.count
        return
    seen.read += 1
    if isinstance(item, Reject):
        _count_rejects(seen, [item])
        return
    record, rejects, _ = screen(item, rules)
    _count_rejects(seen, rejects)
    if record is None:
        return
    seen.written += 1
    seen.captions += record.captions
    seen.roles.update(record.roles or ())
    seen.image_bytes += len(record.image)
    seen.text += count_text(item, record, rules.word_limit, tokenizer)
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
    """Return the number of pairs: exact for lists, else estimated from input and image sizes."""
    listed = sum(chunk.pairs or 0 for chunk in chunks)
    input_bytes = sum(chunk.input_bytes for chunk in chunks)
    return listed + (round(input_bytes * read / seen_bytes) if seen_bytes else 0)
