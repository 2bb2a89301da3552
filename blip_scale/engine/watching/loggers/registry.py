"""The loggers that `log.to` chooses from, and the group of those that a run has."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from blip_scale.engine.watching.loggers.logger import LoggedRun, Logger
    from blip_scale.engine.watching.pictures import Panel

logger = logging.getLogger(__name__)

_HERE = "blip_scale.engine.watching.loggers"


@dataclass(frozen=True)
class LoggerKind:
    """A logger to choose."""

    module: str
    """Module of the class, imported when it is chosen."""
    name: str
    """Name of the class (see `logger.Logger`)."""
    package: str = ""
    """Package that must be installed for it."""


LOGGERS: dict[str, LoggerKind] = {
    "tensorboard": LoggerKind(f"{_HERE}.tensorboard", "TensorBoardLogger"),
    "wandb": LoggerKind(f"{_HERE}.weights_and_biases", "WandbLogger", "wandb"),
    "csv": LoggerKind(f"{_HERE}.csv_file", "CsvLogger"),
}
"""Name in `log.to` -> the logger. An entry is all that a new one needs."""


def check(names: Sequence[str]) -> None:
    """Refuse loggers that can't be had, before torch is imported.

    Raises:
        ValueError: a name that is not in `LOGGERS` or comes twice, or a package that is missing.
    """
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"log.to: no logger {name!r}; expected some of {', '.join(LOGGERS)}")
        if names.count(name) > 1:
            raise ValueError(f"log.to: {name} comes twice; name it once")
        package = LOGGERS[name].package
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"log.to: {name} needs the package {package}: `pip install {package}`, or take "
                f"{name} out of log.to"
            )


class LoggerGroup:
    """The loggers of a run. None of them can stop it.

    After an OSError (a full disk) a logger is opened again at its next point, so it loses the
    points until the disk works. After any other error it stays closed. Each case has one warning.
    """

    def __init__(self, names: Sequence[str], run: LoggedRun) -> None:
        """Open the loggers.

        Args:
            names: names in `LOGGERS`.
            run: the run that they show.
        """
        self._run = run
        self._open: dict[str, Logger | None] = dict.fromkeys(names)
        self._failing: set[str] = set()
        self._each(run.start_step, lambda opened: None)

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point everywhere; see `logger.Logger`, also for the next two."""
        self._each(step, lambda opened: opened.scalars(step, metrics))

    def pictures(self, step: int, name: str, sheet: Tensor, panels: Sequence[Panel]) -> None:
        """Show captioned images everywhere."""
        self._each(step, lambda opened: opened.pictures(step, name, sheet, panels))

    def text(self, step: int, name: str, text: str) -> None:
        """Show a text everywhere."""
        self._each(step, lambda opened: opened.text(step, name, text))

    def close(self, finished: bool) -> None:
        """Close all loggers; a second call does nothing."""
        for name in [name for name, opened in self._open.items() if opened is None]:
            del self._open[name]
        self._each(self._run.start_step, lambda opened: opened.close(finished))
        self._open = {}

    def _each(self, step: int, action: Callable[[Logger], None]) -> None:
        for name in list(self._open):
            try:
                action(self._opened(name))
                self._failing.discard(name)
            except OSError as error:
                if name not in self._failing:
                    logger.warning(
                        "log.to: %s loses points (%s); training continues, and so does %s when "
                        "the disk takes them again", name, error, name,
                    )  # fmt: skip
                self._failing.add(name)
                self._open[name] = None
                self._run = replace(self._run, start_step=step)
            except Exception as error:  # each service has its own errors
                logger.warning(
                    "log.to: %s failed and is left out from step %d on (%s: %s); training "
                    "continues", name, step, type(error).__name__, error,
                )  # fmt: skip
                del self._open[name]

    def _opened(self, name: str) -> Logger:
        opened = self._open[name]
        if opened is None:
            kind = LOGGERS[name]
            opened = getattr(importlib.import_module(kind.module), kind.name)(self._run)
            self._open[name] = opened
        assert opened is not None
        return opened
