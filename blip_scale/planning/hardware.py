"""GPUs by name, with the specifications that a plan needs.

Specifications are the vendors', for dense matrix products, and for the SXM version if there is one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One device, and the links of the node in which it is usually sold."""

    memory_gib: float
    """Usable memory, which is slightly less than the nominal size."""
    bf16_tflops: float | None
    """Peak of dense bf16 matrix products. None if there are no bf16 matrix units."""
    fp32_tflops: float
    """Peak in true fp32, torch's default."""
    memory_gb_s: float
    link_gb_s: float
    """Bandwidth to the other GPUs of the node in one direction: NVLink, else PCIe."""
    network_gbit: float
    """Bandwidth of all network cards of a node together."""


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
    """Find a GPU by its name in `GPUS`, or by a family with only one member (`v100`).

    Case, `gb` and punctuation are ignored: `A100-80GB` and `RTX 4090` are valid.

    Raises:
        ValueError: no GPU or several GPUs match. The message lists all names.
    """
    wanted = _plain(name)
    exact = [gpu for listed, gpu in GPUS.items() if _plain(listed) == wanted]
    family = [listed for listed in GPUS if listed.partition("-")[0] == wanted]
    if exact:
        return exact[0]
    if len(family) == 1:
        return GPUS[family[0]]
    reason = f"which one, {' or '.join(family)}?" if family else "not a GPU that is listed here;"
    raise ValueError(f"--gpu {name}: {reason} give one of {', '.join(GPUS)}")


def _plain(name: str) -> str:
    """Letters and digits of a name, without the vendor and the unit of the memory."""
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia").removesuffix("gb")
