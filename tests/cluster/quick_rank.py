"""A rank without a network, for tests of the job script: it is up in a second.

It counts steps together with the other ranks, saves, and obeys signals like train.py. Like a rank
in NCCL, it waits for a dead one for ever, whatever signals come. `fail_at=N` makes rank 1 fail in
step N. While OUTPUT_DIR/saving_is_slow exists, a stop is never saved.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from blip_scale import launcher
from blip_scale.config import exit_codes
from blip_scale.storage import run_folder

IMPORTS_S = 1.5
"""Time before the rank handles signals."""
STEP_S, EVERY_STEPS = 0.1, 5
MESSAGE = "this batch cannot be computed"
SLOW = "saving_is_slow"


def main() -> int:
    """Count steps until a signal comes. Returns the exit code."""
    time.sleep(IMPORTS_S)
    settings = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    folder = Path(settings["output_dir"])
    launcher.adopt()
    rank, ranks = launcher.rank(), int(os.environ["WORLD_SIZE"])
    start = f"{os.environ.get('SLURM_RESTART_COUNT', '0')}.{os.environ['BLIP_SCALE_LAUNCH']}"
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: signals.append(number))
    checkpoints = folder / run_folder.CHECKPOINTS
    first = max([0, *run_folder.steps(path.name for path in checkpoints.glob("*"))])
    peers = [folder / f"steps_{start}_{peer}" for peer in range(ranks)]
    for step in range(first + 1, 1_000_000):
        if step == int(settings.get("fail_at", "0")) and rank == 1:
            raise RuntimeError(MESSAGE)
        with peers[rank].open("a") as file:
            file.write(f"{step} {len(signals)}\n")
        lines = [_line(peer, step - first) for peer in peers]
        is_stopped = any(int(line.split()[1]) for line in lines)
        while is_stopped and (folder / SLOW).exists():
            time.sleep(STEP_S)
        if rank == 0 and (is_stopped or step % EVERY_STEPS == 0):
            (checkpoints / run_folder.step_folder(step)).mkdir(parents=True, exist_ok=True)
            beat = {"time": time.time(), "phase": "training", "checkpoint_step": step}
            (folder / run_folder.HEARTBEAT).write_text(json.dumps(beat))
        if is_stopped:
            return exit_codes.REQUEUE
        time.sleep(STEP_S)
    return exit_codes.FAILED


def _line(file: Path, number: int) -> str:
    """Line of a file that another rank writes, waiting for it."""
    while True:
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        if len(lines) >= number and lines[number - 1].endswith("\n"):
            return lines[number - 1]
        time.sleep(0.01)


if __name__ == "__main__":
    launcher.end_process(main())
