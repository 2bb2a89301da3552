"""train.py in which rank 0 is killed while it saves step 6, at the moment `--moment=NAME`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from blip_scale import train
from blip_scale.storage import checkpoint_format

MOMENTS = {"writing": "save_file", "committing": "commit"}
"""Name of the moment -> function of `storage.checkpoint_format` in which rank 0 is killed. The
first runs in the background thread during training, the second in the main thread."""
_DOOMED = "step_00000006.partial"


def kill_in(moment: str) -> None:
    """Patch a function, so that it kills the process when it is called for the checkpoint."""
    original = getattr(checkpoint_format, MOMENTS[moment])

    def dying(*arguments: Any) -> Any:
        path = next(argument for argument in arguments if isinstance(argument, Path))
        if _DOOMED not in str(path) or os.environ["RANK"] != "0":
            return original(*arguments)
        if moment == "writing":  # leave half a file, while training is at the next step
            original(*arguments)
            os.truncate(path, path.stat().st_size // 2)
            metrics = path.parent.parent.parent / "metrics.jsonl"
            while '"step": 7,' not in metrics.read_text():
                time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    setattr(checkpoint_format, MOMENTS[moment], dying)


if __name__ == "__main__":
    (moment,) = (part for part in sys.argv if part.startswith("--moment="))
    sys.argv.remove(moment)
    kill_in(moment.partition("=")[2])
    train.command()
