"""Serve the demo page, from a clone: the same as `blip-scale demo-page`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from blip_scale.commands.demo_page import main

if __name__ == "__main__":
    sys.exit(main())
