"""Run the contenders of a benchmark in processes that take turns."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True)
class Failure:
    """Answer of a contender whose call raised an exception."""

    kind: str
    """Name of the exception class."""
    message: str

    @staticmethod
    def of(error: Exception) -> Failure:
        """Describe an exception."""
        return Failure(type(error).__name__, " ".join(str(error).split())[:500])


DIED = Failure("died", "see the messages above")


class ContenderError(RuntimeError):
    """A contender failed or died."""

    def __init__(self, name: str, failure: Failure) -> None:
        super().__init__(f"contender {name}: {failure.kind}: {failure.message}")
        self.failure = failure


class Contest:
    """New processes that answer requests from pipes. Leaving the `with` block ends them."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._contenders: list[tuple[Connection, BaseProcess]] = []

    def start(self, serve: Callable[..., None], *arguments: Any) -> Connection:
        """Run `serve(pipe, *arguments)` in a new process. Returns this end of its pipe."""
        near_end, far_end = self._context.Pipe()
        process = self._context.Process(target=serve, args=(far_end, *arguments))
        process.start()
        far_end.close()
        self._contenders.append((near_end, process))
        return near_end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe, _ in self._contenders:
            pipe.close()
        for _, process in self._contenders:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def ask(pipe: Connection, name: str, question: Any) -> Any:
    """Send a request to a contender and return its answer.

    Raises:
        ContenderError: the contender failed or died.
    """
    try:
        pipe.send(question)
    except OSError as error:
        raise ContenderError(name, DIED) from error
    return receive(pipe, name)


def receive(pipe: Connection, name: str) -> Any:
    """Return the answer to an earlier request.

    Raises:
        ContenderError: the contender failed or died.
    """
    try:
        answer = pipe.recv()
    except (EOFError, OSError) as error:
        raise ContenderError(name, DIED) from error
    if isinstance(answer, Failure):
        raise ContenderError(name, answer)
    return answer
