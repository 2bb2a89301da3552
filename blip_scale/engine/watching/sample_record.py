"""Which samples were used, step by step: samples/rank_N.jsonl."""

from __future__ import annotations

from pathlib import Path

from blip_scale.engine import collectives
from blip_scale.storage import files, run_folder


class SampleRecord:
    """The ids of every step in the order in which this rank read them, one line a step.

    What lies past the step that the run goes on from is taken back, in the files of more ranks than
    there are now as well: what remains was trained on, each sample as often as it is there.
    """

    def __init__(self, output_dir: Path, start_step: int, enabled: bool) -> None:
        """Args:
        output_dir: folder of the run.
        start_step: steps done when the run starts or resumes.
        enabled: without it nothing is written.
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
        """Note the samples of a step, counted from 1."""
        if self._enabled:
            with self._disk:
                files.add_line(self._file, step, {"ids": ids})
