"""Contenders of a benchmark: processes of their own, which wait for their turn."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self


class Contest:
    """Fresh processes, ended with the `with` block; each answers what its pipe brings."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._contenders: list[tuple[Connection, BaseProcess]] = []

    def start(self, serve: Callable[..., None], *arguments: Any) -> Connection:
        """Run `serve(pipe, *arguments)` in a process; gives this end of its pipe."""
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs, *arguments))
        process.start()
        theirs.close()
        self._contenders.append((mine, process))
        return mine

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
    """What the contender answers; raises RuntimeError where it died."""
    try:
        pipe.send(question)
        return pipe.recv()
    except (EOFError, BrokenPipeError) as error:
        raise RuntimeError(f"contender {name} died; see above") from error
