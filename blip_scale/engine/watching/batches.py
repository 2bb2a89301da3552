"""Progress callbacks for loops over batches that have no access to the run, as in evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

_listeners: list[Callable[[bool], None]] = []
_counters: list[Callable[[int], object]] = []


def listen(
    listener: Callable[[bool], None] | None, counter: Callable[[int], object] | None = None
) -> None:
    """Replace the progress callbacks of `beating`. None: no callback.

    Args:
        listener: called with True before each batch, and with False after the last one.
        counter: called with the number of batches at the start of each loop.
    """
    _listeners[:] = [] if listener is None else [listener]
    _counters[:] = [] if counter is None else [counter]


def beating(batches: Sequence[T]) -> Iterator[T]:
    """Yield the batches and call the progress callbacks."""
    for counter in _counters:
        counter(len(batches))
    for batch in batches:
        for listener in _listeners:
            listener(True)
        yield batch
    for listener in _listeners:
        listener(False)
