"""Estimate the needs of a run, from a clone: the same as `blip-scale plan`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from blip_scale.commands.main import command

if __name__ == "__main__":
    command("plan")
