"""torch.compile for the ViT blocks and text layers of a network.

Compiled code fuses norms, GELU, dropout and biases with neighbouring operations. Attention and
matrix products remain calls of their kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from blip_scale.model.text import TextLayer
from blip_scale.model.towers import BLOCKS

_GRAPHS = 64
"""Limit of torch's graphs per kind of block. Text layers need at most six for each set of shapes:
the last layer differs from the others, and three passes use the layers (ITC with gradient, ITC
without, and ITM with LM)."""


def compile_blocks(network: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each ViT block and text layer into one graph, at its first call.

    All blocks of a kind share their graphs. Text layers are compiled for the first sizes that
    occur. When other sizes follow, they are compiled once more for dynamic sizes.

    Args:
        network: network with online and momentum towers, changed in place. Weights must be gathered
            before a block is called, because torch.compile can't trace a hook that gathers them.
        backend: backend of torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
    for module in network.modules():
        if isinstance(module, BLOCKS):
            module.compile(fullgraph=True, dynamic=False, backend=backend)
        elif isinstance(module, TextLayer):
            module.compile(fullgraph=True, backend=backend)
