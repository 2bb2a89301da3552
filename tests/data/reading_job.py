"""A separate process that reads batch after batch from a loader with workers.

The pickled loader comes through stdin. The ids of each batch are a line of JSON on stdout.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

_REPO = Path(__file__).resolve().parent.parent.parent


class ReadingJob:
    """Handle of the test on the process."""

    def __init__(self, loader: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(_REPO)},
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._batches = self._process.stdout
        self._process.stdin.write(pickle.dumps(loader))
        self._process.stdin.close()

    def next_ids(self) -> list[str]:
        """Ids of the next batch."""
        return list(json.loads(self._batches.readline()))

    def kill(self) -> None:
        """SIGKILL the process, but not its workers."""
        self._process.kill()
        self._process.wait()
        self._batches.close()


if __name__ == "__main__":
    for batch in pickle.load(sys.stdin.buffer):
        print(json.dumps(batch.ids), flush=True)
