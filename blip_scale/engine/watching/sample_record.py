"""Record of the samples of every step: samples/rank_N.jsonl."""

from __future__ import annotations

from pathlib import Path

from blip_scale.engine import collectives
from blip_scale.storage import files, run_folder


class SampleRecord:
    """Records sample ids in the order in which this rank read them, one line per step.

    Lines after the step from which the run resumes are removed, also in files of ranks that no
    longer exist. The files therefore list each sample as often as it was trained on.
    """

    def __init__(self, output_dir: Path, start_step: int, enabled: bool) -> None:
        """Remove lines after `start_step`.

        Args:
            output_dir: folder of the run.
            start_step: steps done when the run starts or resumes.
            enabled: whether ids are written from now on.
        """
        folder = output_dir / run_folder.SAMPLES
        rank, world_size = collectives.rank(), collectives.world_size()
        self._file = folder / run_folder.samples_of(rank)
        self._enabled = enabled
        self._disk = files.Spared(f"record of the samples in {self._file}")
        with self._disk:
            for file in folder.glob(run_folder.SAMPLES_PATTERN):
                writer = run_folder.rank_of_samples(file.name)
                if writer is not None and writer % world_size == rank:
                    files.take_back(file, start_step)
            if enabled:
                folder.mkdir(parents=True, exist_ok=True)

    def add(self, step: int, ids: list[str]) -> None:
        """Write the ids of a step. Steps are counted from 1."""
        if self._enabled:
            with self._disk:
                files.add_line(self._file, step, {"ids": ids})
