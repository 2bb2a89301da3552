"""torch.compile for the ViT blocks and text layers of a network.

Compiled code fuses norms, GELU, dropout and biases with their neighbours. Attention and matrix
products stay calls of their kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from blip_scale.model.text import TextLayer
from blip_scale.model.towers import BLOCKS

_GRAPHS = 64
"""Graphs that torch may compile for one kind of block before it gives up. Text layers have at most
six for each set of shapes. The last layer differs from the others, and three passes use them: ITC
with gradient, ITC without, and ITM with LM."""


def compile_blocks(network: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each ViT block and text layer as one graph, at its first call.

    All blocks of a kind share their graphs. Text layers are compiled for the first sizes that they
    see. When other sizes follow, they are compiled once more for all sizes.

    Args:
        network: online and momentum towers; changed in place. Weights must be whole when a block
            is called: a hook that gathers them cannot be compiled.
        backend: backend of torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
    for module in network.modules():
        if isinstance(module, BLOCKS):
            module.compile(fullgraph=True, dynamic=False, backend=backend)
        elif isinstance(module, TextLayer):
            module.compile(fullgraph=True, backend=backend)
