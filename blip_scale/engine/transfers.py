"""Copies between host and device. Only `to_host` waits for the device.

`torch.tensor(values, device="cuda")` copies from pageable memory and makes the host wait, like
`item()` and `tolist()`. A training step reads the device once, with `to_host`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(
    values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Copy numbers to a tensor [len(values)] on the device. The host does not wait."""
    pinned = device.type == "cuda"
    host = torch.tensor(values, dtype=dtype, pin_memory=pinned)
    return host.to(device, non_blocking=True)


def to_host(values: Tensor) -> list[float]:
    """Copy a tensor [N] to a list. Waits until the device has computed it."""
    if values.device.type != "cuda":
        return values.tolist()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    copied.synchronize()
    return host.tolist()
