"""The network alone: torch and timm. Knows no rank, no file, no tokenizer, no recipe."""

from blip_scale.model.attention import (
    AttentionLayout,
    Kernel,
    Segments,
    attention,
    resolve_kernel,
)
from blip_scale.model.flops import (
    TextWork,
    captioning_flops,
    fine_tuning_flops,
    head_flops,
    pretraining_flops,
    recomputation_flops,
    retrieval_flops,
)
from blip_scale.model.generation import (
    BeamSettings,
    NucleusSettings,
    caption_beam,
    caption_nucleus,
)
from blip_scale.model.initialization import INIT_STD, fill_from_med, init_weights
from blip_scale.model.med import MED, MEDConfig, MomentumEncoder, Temperature
from blip_scale.model.nlvr2 import NLVR2
from blip_scale.model.packing import PackedText
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.visdial import VisDial
from blip_scale.model.vision import VisionConfig, build_vision, training_tokens
from blip_scale.model.vqa import VQA

__all__ = [
    "INIT_STD",
    "MED",
    "NLVR2",
    "VQA",
    "AttentionLayout",
    "BeamSettings",
    "Kernel",
    "MEDConfig",
    "MomentumEncoder",
    "NucleusSettings",
    "PackedText",
    "Segments",
    "SpecialTokens",
    "Temperature",
    "TextConfig",
    "TextWork",
    "VisDial",
    "VisionConfig",
    "attention",
    "build_vision",
    "caption_beam",
    "caption_nucleus",
    "captioning_flops",
    "fill_from_med",
    "fine_tuning_flops",
    "head_flops",
    "init_weights",
    "pretraining_flops",
    "recomputation_flops",
    "resolve_kernel",
    "retrieval_flops",
    "training_tokens",
]
