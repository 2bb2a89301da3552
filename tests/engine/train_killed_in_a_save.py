"""train.py in which rank 0 is killed inside the save of step 6: `--moment=NAME` says where."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from blip_scale import train
from blip_scale.engine import checkpoint

MOMENTS = {"writing": "_write", "committing": "_commit"}
"""Name of the moment -> what of blip_scale.engine.checkpoint is not reached any more."""
_DOOMED = "step_00000006.partial"


def kill_before(name: str) -> None:
    """Replace a function by one that dies when it is called for the doomed checkpoint."""
    original = getattr(checkpoint, name)

    def dying(path: Path, *arguments: Any) -> Any:
        if _DOOMED in str(path) and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, *arguments)

    setattr(checkpoint, name, dying)


if __name__ == "__main__":
    (moment,) = (part for part in sys.argv if part.startswith("--moment="))
    sys.argv.remove(moment)
    kill_before(MOMENTS[moment.partition("=")[2]])
    train.command()
