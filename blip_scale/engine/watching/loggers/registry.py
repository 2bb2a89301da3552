"""Registry of the loggers for `log.to`, and the group of loggers of a run."""

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
    """Location of a logger class."""

    module: str
    """Module of the class. It is imported only if the logger is used."""
    name: str
    """Name of the class (see `logger.Logger`)."""
    package: str = ""
    """Package that the logger requires; empty if none."""


LOGGERS: dict[str, LoggerKind] = {
    "tensorboard": LoggerKind(f"{_HERE}.tensorboard", "TensorBoardLogger"),
    "wandb": LoggerKind(f"{_HERE}.weights_and_biases", "WandbLogger", "wandb"),
    "csv": LoggerKind(f"{_HERE}.csv_file", "CsvLogger"),
}
"""Name in `log.to` -> logger. To register a logger, add an entry."""


def check(names: Sequence[str]) -> None:
    """Check the names in `log.to`, without importing torch.

    Raises:
        ValueError: a name is not in `LOGGERS` or occurs twice, or a package is missing.
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
    """Loggers of a run. An error of a logger does not stop the run.

    After an OSError, such as a full disk, a logger is reopened at the next point. It loses the
    points until it works again. After any other error, it is removed. Each case is warned of once.
    """

    def __init__(self, names: Sequence[str], run: LoggedRun) -> None:
        """Open the loggers.

        Args:
            names: names in `LOGGERS`.
            run: run to log.
        """
        self._run = run
        self._open: dict[str, Logger | None] = dict.fromkeys(names)
        self._failing: set[str] = set()
        self._each(run.start_step, lambda opened: None)

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Call `Logger.scalars` of each logger."""
        self._each(step, lambda opened: opened.scalars(step, metrics))

    def pictures(self, step: int, name: str, sheet: Tensor, panels: Sequence[Panel]) -> None:
        """Call `Logger.pictures` of each logger."""
        self._each(step, lambda opened: opened.pictures(step, name, sheet, panels))

    def text(self, step: int, name: str, text: str) -> None:
        """Call `Logger.text` of each logger."""
        self._each(step, lambda opened: opened.text(step, name, text))

    def close(self, finished: bool) -> None:
        """Close all loggers. A second call has no effect."""
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
