"""train.py with two additional trainable parameters: a scale of the ITM logits, which is in MED,
and an offset of the loss, which is outside MED."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torch import Tensor, nn

from blip_scale import train
from blip_scale.model.med import MED
from blip_scale.tasks.pretrain import PretrainNetwork

SCALE, OFFSET = "med.itm_scale.value", "offset.value"


class Drawn(nn.Module):
    """Module with one parameter, which its constructor initialises at random."""

    def __init__(self, size: int, mean: float) -> None:
        super().__init__()
        self.value = nn.Parameter(mean + 0.1 * torch.randn(size))

    def forward(self) -> Tensor:
        """Return a copy of the parameter, because ZeRO-3 releases the original."""
        return self.value.clone()


def add(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Patch MED and the pretraining network, so that each has its new parameter."""
    med_init, match, sweep = MED.__init__, MED.match, MED.sweep
    network_init, forward = PretrainNetwork.__init__, PretrainNetwork.forward

    def init_med(self: MED, *arguments: Any) -> None:
        med_init(self, *arguments)
        self.itm_scale = Drawn(2, 1.0)

    def scaled_match(self: MED, *arguments: Any) -> Tensor:
        return match(self, *arguments) * self.itm_scale()

    def scaled_sweep(self: MED, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        itm_logits, lm_logits, lm_targets = sweep(self, *arguments)
        return itm_logits * self.itm_scale(), lm_logits, lm_targets

    def init_network(self: PretrainNetwork, *arguments: Any) -> None:
        network_init(self, *arguments)
        self.offset = Drawn(3, 0.0)

    def penalised(self: PretrainNetwork, *arguments: Any) -> dict[str, Tensor]:
        metrics = forward(self, *arguments)
        return metrics | {"loss/total": metrics["loss/total"] + self.offset().square().sum()}

    set_attribute(MED, "__init__", init_med)
    set_attribute(MED, "match", scaled_match)
    set_attribute(MED, "sweep", scaled_sweep)
    set_attribute(PretrainNetwork, "__init__", init_network)
    set_attribute(PretrainNetwork, "forward", penalised)


if __name__ == "__main__":
    add()
    train.command()
