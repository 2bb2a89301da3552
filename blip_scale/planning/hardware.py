"""GPUs by name: what a plan needs to know of them. Makers' figures, dense, of the SXM form where
there are several."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One device, and the links of the node that it is usually sold in."""

    memory_gib: float
    """What a program finds, a little below the name's figure."""
    bf16_tflops: float | None
    """Dense matrix products; None: no bf16 matrix units."""
    fp32_tflops: float
    """True fp32, as torch computes by default."""
    memory_gb_s: float
    link_gb_s: float
    """To the other GPUs of the node, one direction: NVLink, or PCIe where there is none."""
    network_gbit: float
    """All network cards of a node together."""


GPUS = {
    "a100-40": GPU(39.4, 312, 19.5, 1555, 300, 1600),
    "a100-80": GPU(79.2, 312, 19.5, 2039, 300, 1600),
    "h100": GPU(79.1, 989, 67, 3350, 450, 3200),
    "h200": GPU(139.8, 989, 67, 4800, 450, 3200),
    "b200": GPU(178.0, 2250, 80, 8000, 900, 3200),
    "l40s": GPU(44.4, 362, 91.6, 864, 32, 400),
    "v100-32": GPU(31.7, None, 15.7, 900, 150, 100),
    "rtx4090": GPU(23.5, 165, 82.6, 1008, 32, 25),
}


def find_gpu(name: str) -> GPU:
    """The GPU of that name.

    Raises:
        ValueError: it is not known; names the ones that are.
    """
    if name in GPUS:
        return GPUS[name]
    near = difflib.get_close_matches(name, GPUS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"--gpu {name}: not known; {hint}there are {', '.join(GPUS)}")
