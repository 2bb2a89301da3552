"""Sizes, special tokens and sentences of the MED of these tests."""

from __future__ import annotations

from collections.abc import Callable

from blip_scale.model.med import MED, MEDConfig
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.vision import VisionConfig

PAD, CLS, SEP, ENC, DEC = range(5)
SPECIAL = SpecialTokens(pad=PAD, cls=CLS, sep=SEP, enc=ENC, dec=DEC)
SENTENCES = [
    [CLS, 7, 8, SEP],
    [CLS, 9, SEP],
    [CLS, 7, 8, 9, 10, 11, SEP],
    [CLS, 20, 21, 22, 23, SEP],
]

MakeMED = Callable[..., MED]


def tiny_config(**changes: object) -> MEDConfig:
    """ViT of 3 blocks, width 24, 17 tokens; text of 3 layers, width 32."""
    sizes = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8}
    text = {"vocab_size": 60, "width": 32, "layers": 3, "heads": 4, "mlp_width": 64}
    text |= {"max_positions": 24, "dropout": 0.0}
    text |= {name: changes.pop(name) for name in list(changes) if name in text}
    return MEDConfig(
        VisionConfig("vit_tiny_patch16_224", 32, sizes), TextConfig(SPECIAL, **text), 16, **changes
    )
