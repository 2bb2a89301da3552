"""Record of the newest evaluation, so that a restart does not repeat it.

A checkpoint is committed before its evaluation begins, so it cannot record the evaluation.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blip_scale.config.recipe import Recipe
from blip_scale.engine.watching.run_manifest import digest, fingerprint
from blip_scale.storage import files, run_folder

logger = logging.getLogger(__name__)

_FORMAT = 1


class EvaluationRecord:
    """Reads and writes evaluation.json in the run's folder; only rank 0 uses it.

    A record is valid for one checkpoint, identified by the hash of its manifest, and for the
    settings that affect the results. Any other record is ignored.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._file = Path(recipe.output_dir) / run_folder.EVALUATION
        settings = asdict(recipe.evaluation)
        del settings["every_steps"]
        heldout = [asdict(stream) for stream in recipe.data.heldout]
        self._settings = digest(json.dumps([settings, heldout]).encode())
        self._disk = files.Spared(f"record of the evaluation in {self._file}")

    def write(self, checkpoint: Path, is_final: bool, results: Mapping[str, Any]) -> None:
        """Record a completed evaluation.

        Args:
            checkpoint: folder of the checkpoint whose weights were evaluated.
            is_final: whether the evaluation was complete, as at the end of a run.
            results: JSON-able results.
        """
        manifest = fingerprint(checkpoint)["manifest_xxh64"]
        if manifest is None:  # the save failed, so no start resumes from this checkpoint
            return
        content = {
            "format": _FORMAT, "manifest_xxh64": manifest, "settings_xxh64": self._settings,
            "is_final": is_final, "results": results,
        }  # fmt: skip
        with self._disk:
            files.write_whole(self._file, json.dumps(content) + "\n")

    def read(self, checkpoint: Path, is_final: bool) -> dict[str, Any] | None:
        """Return the results for a checkpoint, or None without a valid record.

        Args:
            checkpoint: folder of the checkpoint.
            is_final: whether a complete evaluation is required.
        """
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            is_same = (
                content["format"] == _FORMAT
                and content["manifest_xxh64"] == fingerprint(checkpoint)["manifest_xxh64"]
                and content["settings_xxh64"] == self._settings
            )
            if not is_same or (is_final and not content["is_final"]):
                return None
            return dict(content["results"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            logger.warning("%s can't be read (%s): evaluating again", self._file, error)
            return None
