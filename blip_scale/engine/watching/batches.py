"""Signs of progress from loops over batches that know no run, such as those of evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_listeners: list[Callable[[bool], None]] = []


def listen(listener: Callable[[bool], None] | None) -> None:
    """Call a function before each batch with True, and after the last with False; None: nobody."""
    _listeners[:] = [] if listener is None else [listener]


def beating(batches: Iterable[T]) -> Iterator[T]:
    """The batches, with a sign of progress before each and after the last."""
    for batch in batches:
        for listener in _listeners:
            listener(True)
        yield batch
    for listener in _listeners:
        listener(False)
