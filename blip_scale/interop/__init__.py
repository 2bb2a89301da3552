"""Weights of others, in and out: Hugging Face BLIP, BERT-type checkpoints, timm ViTs."""

from blip_scale.interop.bert import from_bert, load_bert
from blip_scale.interop.huggingface import from_huggingface, to_huggingface
from blip_scale.interop.vision import interpolate_positions, load_vision

__all__ = [
    "from_bert",
    "from_huggingface",
    "interpolate_positions",
    "load_bert",
    "load_vision",
    "to_huggingface",
]
