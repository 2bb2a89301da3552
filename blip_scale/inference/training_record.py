"""Training data of a checkpoint, read from the files of its run or from the card of its export.

These files may come from a stranger. Their texts are therefore never rendered as Markdown or HTML.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip_scale.config import recipe as recipes
from blip_scale.interop.training_checkpoints import step_folder
from blip_scale.storage import run_folder
from blip_scale.storage.untrusted import parse_json

logger = logging.getLogger(__name__)

CARD = "README.md"
"""File name of the model card in an exported folder."""
_TRAINING, _FIGURES, _WARNINGS = "Training", "Held-out figures", "Warnings at the end of training"
"""Headings of the card's sections."""


@dataclass(frozen=True)
class TrainingRecord:
    """Data, length and results of a training, as far as the checkpoint's files state them."""

    steps: int | None = None
    """Number of optimizer steps up to this checkpoint."""
    pairs_per_step: int | None = None
    """Global batch size."""
    data: Mapping[str, int | None] = field(default_factory=dict)
    """Name of the training set -> number of samples; None if it is not recorded."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Held-out figures of this checkpoint by `set/figure`; empty if the run went on after it."""
    alarms: tuple[str, ...] = ()
    """Warnings that were active at the end of the training."""

    @property
    def pairs(self) -> int | None:
        """Number of image-text pairs seen in training, including repeats."""
        if self.steps is None or self.pairs_per_step is None:
            return None
        return self.steps * self.pairs_per_step


def training_record(checkpoint: Path) -> TrainingRecord | None:
    """Read the training record of a checkpoint of any kind; None if no file states one.

    A file that cannot be read is skipped, with a warning.
    """
    folder = step_folder(checkpoint) if checkpoint.is_dir() else None
    if folder is not None:
        run = folder.parent.parent
        return _record_of_run(run, folder) if (run / run_folder.RECIPE).is_file() else None
    for card in (checkpoint / CARD, checkpoint / "captioning" / CARD):
        if card.is_file():
            try:
                return record_of_card(card.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                logger.warning("%s cannot be read (%s): its training is not shown", card, error)
    return None


def _record_of_run(run: Path, folder: Path) -> TrainingRecord:
    recipe = recipes.load(str(run / run_folder.RECIPE))
    steps = run_folder.steps([folder.name])
    step = steps[0] if steps else None
    manifest, summary = _json_of(run / run_folder.RUN_MANIFEST), _json_of(run / run_folder.SUMMARY)
    data: dict[str, int | None] = {stream.name: None for stream in recipe.data.streams}
    state = manifest.get("state")
    streams = state.get("data") if isinstance(state, dict) else None
    for stream in streams if isinstance(streams, list) else []:
        name = stream.get("name") if isinstance(stream, dict) else None
        if isinstance(name, str) and name in data:
            samples = stream.get("samples")
            data[name] = samples if isinstance(samples, int) else None
    is_last = step is not None and summary.get("steps") == step
    figures = summary.get("evaluation") if is_last else None
    alarms = summary.get("alarms") if is_last else None
    return TrainingRecord(
        step,
        recipe.train.global_batch_size,
        data,
        _numbers(figures if isinstance(figures, dict) else {}),
        _messages(alarms if isinstance(alarms, dict) else {}),
    )


def _json_of(file: Path) -> dict[str, Any]:
    """Read the object in a file; empty without the file."""
    if not file.is_file():
        return {}
    try:
        content = parse_json(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s): it is left out", file, error)
        return {}
    return content


def _numbers(figures: Mapping[Any, Any]) -> dict[str, float]:
    """Select the figures that are numbers. A figure that was not finite is null in the file."""
    numbers = {}
    for name, value in figures.items():
        if isinstance(value, int | float):
            numbers[str(name)] = float(value)
    return numbers


def _messages(alarms: Mapping[Any, Any]) -> tuple[str, ...]:
    messages = []
    for alarm in alarms.values():
        if isinstance(alarm, dict) and isinstance(alarm.get("message"), str):
            messages.append(alarm["message"])
    return tuple(messages)


def record_of_card(card: str) -> TrainingRecord | None:
    """Read the record in a model card of this package; None without a table of the training."""
    sections = {heading.strip(): body for heading, body in _SECTION.findall(card)}
    training = dict(_ROW.findall(sections.get(_TRAINING, "")))
    if not training:
        return None
    figures = {}
    for name, text in _ROW.findall(sections.get(_FIGURES, "")):
        try:
            figures[name] = float(text)
        except ValueError:  # "not finite"
            continue
    names = [name for name in training.get("data", "").split(", ") if name]
    return TrainingRecord(
        _whole_number(training.get("steps", "")),
        _whole_number(training.get("pairs a step", "")),
        dict.fromkeys(names),
        figures,
        tuple(_ALARM.findall(sections.get(_WARNINGS, ""))),
    )


_SECTION = re.compile(r"^## (.+)\n((?:(?!## ).*\n?)*)", re.MULTILINE)
_ROW = re.compile(r"^\| ([^|\n]+) \| ([^|\n]+) \|$", re.MULTILINE)
_ALARM = re.compile(r"^- (.+?)(?: \(`alarm/[^)]*\))?$", re.MULTILINE)


def _whole_number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() else None
