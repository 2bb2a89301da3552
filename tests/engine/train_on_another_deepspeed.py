"""train.py with a DeepSpeed version for which our patches have not been tested."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import deepspeed

from blip_scale import train

if __name__ == "__main__":
    deepspeed.__version__ = "0.19.999"
    train.command()
