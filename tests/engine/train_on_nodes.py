"""train.py on ranks without a shared disk: with `--nodes=FOLDER`, each rank has its own output_dir
in the folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from blip_scale import train

if __name__ == "__main__":
    (nodes,) = (part for part in sys.argv if part.startswith("--nodes="))
    sys.argv.remove(nodes)
    sys.argv.append(f"output_dir={nodes.partition('=')[2]}/node_{os.environ['RANK']}")
    train.command()
