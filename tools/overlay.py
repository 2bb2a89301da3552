"""Join new captions to shards of images, from a clone: the same as `blip-scale overlay`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from blip_scale.commands.overlay import main

if __name__ == "__main__":
    sys.exit(main())
