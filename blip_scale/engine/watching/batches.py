"""Signs of progress from loops over batches that know no run, such as those of evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

_listeners: list[Callable[[bool], None]] = []
_counters: list[Callable[[int], object]] = []


def listen(
    listener: Callable[[bool], None] | None, counter: Callable[[int], object] | None = None
) -> None:
    """Call `listener` before each batch with True, and after the last with False; None: nobody.

    At the beginning of each loop, call `counter` with its number of batches.
    """
    _listeners[:] = [] if listener is None else [listener]
    _counters[:] = [] if counter is None else [counter]


def beating(batches: Sequence[T]) -> Iterator[T]:
    """The batches, with a sign of progress before each and after the last."""
    for counter in _counters:
        counter(len(batches))
    for batch in batches:
        for listener in _listeners:
            listener(True)
        yield batch
    for listener in _listeners:
        listener(False)
