"""A rank that joins the others and prints the addresses on which it listens."""

from __future__ import annotations

import json
import os
import sys

import psutil

from blip_scale.engine import collectives
from blip_scale.engine.zero.engine import start

start(120.0)
here = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"]
everywhere = collectives.all_gather_objects(here)
if collectives.rank() == 0:
    print(json.dumps(everywhere))
sys.stdout.flush()
os._exit(0)
