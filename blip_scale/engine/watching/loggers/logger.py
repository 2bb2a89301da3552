"""The interface of a logger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from blip_scale.engine.watching.pictures import Panel


@dataclass(frozen=True)
class LoggedRun:
    """Run that a logger shows."""

    output_dir: Path
    """Folder of the run; it exists."""
    start_step: int
    """Optimizer steps done at this start. Points after it, from a start that was killed, are stale:
    the run computes them again."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The recipe as a nested dict, without credentials."""
    start_samples: int | None = None
    """Training pairs seen before this start. None: `start_step` x pairs per step."""


class Logger(Protocol):
    """Interface of a logger. Only the main rank has loggers.

    A logger may raise any exception; `registry.LoggerGroup` handles it.
    """

    def __init__(self, run: LoggedRun) -> None:
        """Open the logger and drop stale points."""

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to every curve and flush it, because a run may be killed at any time.

        Args:
            step: optimizer steps done.
            metrics: values by name (`loss/itc`, ...), `samples` and `time` (Unix) among them; a
                value may be NaN or infinite.
        """

    def pictures(self, step: int, name: str, sheet: Tensor, panels: Sequence[Panel]) -> None:
        """Show captioned images.

        Args:
            step: optimizer steps done.
            name: name of the held-out set.
            sheet: uint8 [3, height, width], all panels drawn on one picture.
            panels: the panels themselves. Their texts come from data and a network: escape them.
        """

    def text(self, step: int, name: str, text: str) -> None:
        """Show a text verbatim, such as the recipe."""

    def close(self, finished: bool) -> None:
        """Close the logger; `finished` tells whether the run reached the end of its recipe."""
