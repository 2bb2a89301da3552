"""torch.compile for the blocks of a network: those of the ViT, and the text layers.

Compiled code fuses norms, GELU, dropout and biases with their neighbours. Attention and matrix
products stay calls of their kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import nn

from blip_scale.model.text import TextLayer

_GRAPHS = 64
"""Graphs of one kind of block before torch gives up; text layers have six, for each set of shapes
at most: the last layer and the others, of ITC with and without gradient, and of ITM with LM."""


def compile_blocks(network: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each ViT block and text layer as one graph, at its first call.

    All blocks of a kind share their graphs. Text is compiled for the first sizes that it comes in;
    where other sizes follow, once more for all sizes.

    Args:
        network: online and momentum towers; changed in place. Weights must be whole when a block
            is called: a hook that gathers them does not compile.
        backend: of torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
    for module in network.modules():
        if isinstance(module, Block):
            module.compile(fullgraph=True, dynamic=False, backend=backend)
        elif isinstance(module, TextLayer):
            module.compile(fullgraph=True, backend=backend)
