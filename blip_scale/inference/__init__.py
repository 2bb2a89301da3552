"""Trained checkpoints in use: any of them loaded, and asked about images."""

from blip_scale.inference.blip import Blip, Use, draws_of
from blip_scale.inference.images import Done, batched, done_ahead, find_images, pixels_of
from blip_scale.inference.loading import (
    PUBLISHED_TOKENIZER,
    Loading,
    load_blip,
    recipe_of,
    text_of,
    tokenizer_of,
)
from blip_scale.inference.sizes import med_config

__all__ = [
    "PUBLISHED_TOKENIZER",
    "Blip",
    "Done",
    "Loading",
    "Use",
    "batched",
    "done_ahead",
    "draws_of",
    "find_images",
    "load_blip",
    "med_config",
    "pixels_of",
    "recipe_of",
    "text_of",
    "tokenizer_of",
]
