"""The network alone: torch and timm. Knows no rank, no file, no tokenizer, no recipe."""

from blip_scale.model.attention import (
    AttentionLayout,
    Kernel,
    Segments,
    attention,
    resolve_kernel,
)
from blip_scale.model.initialization import init_weights
from blip_scale.model.med import MED, MEDConfig, MomentumEncoder, Temperature
from blip_scale.model.text import PackedText, SpecialTokens, TextConfig
from blip_scale.model.vision import VisionConfig, build_vision

__all__ = [
    "MED",
    "AttentionLayout",
    "Kernel",
    "MEDConfig",
    "MomentumEncoder",
    "PackedText",
    "Segments",
    "SpecialTokens",
    "Temperature",
    "TextConfig",
    "VisionConfig",
    "attention",
    "build_vision",
    "init_weights",
    "resolve_kernel",
]
