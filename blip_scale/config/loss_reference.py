"""Read the losses of another run from a file, for comparison with the current run."""

from __future__ import annotations

import csv
import itertools
from dataclasses import asdict, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from blip_scale.config import settings
from blip_scale.config.recipe import RECIPES, Recipe

FOLDER = RECIPES / "references"
"""Folder of the references shipped with the package."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Reference:
    """Losses of another run."""

    losses: dict[str, list[float | None]]
    """Name of a loss (itc, itm, lm) -> its mean over epoch 0, 1, ...; null: unknown."""
    source: str = ""
    """Origin of the losses."""
    needs: dict[str, list[Any]] = field(default_factory=dict)
    """Dotted name of a setting -> values with which a run is comparable."""
    samples_per_epoch: tuple[float, float] | None = None
    """Smallest and largest epoch of a comparable run, in samples; null: any."""

    def at(self, epoch: float) -> dict[str, float]:
        """Return the losses `reference/NAME` at a position in epochs, such as 1.5.

        The mean over an epoch is placed at the middle of the epoch. Values in between are
        interpolated linearly. A loss has no value before the middle of its first known epoch, and
        none after the end of its last one.
        """
        values = {}
        for name, means in self.losses.items():
            middles = [(n + 0.5, mean) for n, mean in enumerate(means) if mean is not None]
            if middles and middles[0][0] <= epoch <= middles[-1][0] + 0.5:
                values[f"reference/{name}"] = _between(middles, epoch)
        return values

    def differences(self, recipe: Recipe, samples_per_epoch: int) -> list[str]:
        """Return the reasons why a run is not comparable: settings, values and needed values."""
        tree = asdict(recipe)
        reasons = []
        for name, allowed in self.needs.items():
            value: Any = tree
            for part in name.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value not in allowed:
                wanted = " or ".join(map(str, allowed))
                reasons.append(f"{name} is {value}, not {wanted}")
        if self.samples_per_epoch is not None:
            low, high = self.samples_per_epoch
            if not low <= samples_per_epoch <= high:
                reasons.append(
                    f"an epoch has {samples_per_epoch} samples, not {low:.0f} to {high:.0f}"
                )
        return reasons


def _between(points: list[tuple[float, float]], position: float) -> float:
    """Interpolate linearly between the neighbouring points; after the last point, use its value."""
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= position <= right:
            return low + (high - low) * (position - left) / (right - left)
    return points[-1][1]


def load(name_or_file: str) -> Reference:
    """Read a reference: a shipped name, a JSON file of its fields, or a CSV table.

    A CSV table has a row for each epoch from 0 on: a column `epoch`, and one for each loss.

    Raises:
        FileNotFoundError: there is no such reference or file.
        ValueError: the file does not hold losses. The message says why.
    """
    shipped = FOLDER / f"{name_or_file}.json"
    file = shipped if shipped.is_file() else Path(settings.expand(name_or_file, "log.reference"))
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in FOLDER.glob("*.json")))
        raise FileNotFoundError(
            f"log.reference: {name_or_file}: no such file; give {names}, or a JSON or CSV file"
        )
    tree = _table(file) if file.suffix == ".csv" else settings.read_yaml(file)
    return settings.build(Reference, tree, str(file))


def _table(file: Path) -> dict[str, Any]:
    """Read the losses in a CSV file, as the fields of a `Reference`."""
    with file.open(encoding="utf-8-sig", newline="") as opened:
        rows = list(csv.DictReader(opened))
    losses: dict[str, list[float | None]] = {}
    for number, row in enumerate(rows):
        if row.pop("epoch", None) != str(number):
            raise ValueError(
                f"{file}, line {number + 2}: expected epoch {number}; give a column `epoch` that "
                "counts from 0, and a column for each loss"
            )
        for name, cell in row.items():
            try:
                losses.setdefault(name, []).append(float(cell) if cell else None)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{file}, line {number + 2}: {name}: {cell!r} is not a number; give one, or "
                    "leave the cell empty"
                ) from error
    return {"losses": losses}
