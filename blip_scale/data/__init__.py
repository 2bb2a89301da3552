"""Pixels and captions: shards, streams and their order, transforms, tokenizer, packed batches."""

from blip_scale.data.batches import Batch, CaptionInput, LoaderPosition
from blip_scale.data.captions import Clean, clean_caption, clean_question
from blip_scale.data.heldout import HeldoutPairs, heldout_pairs
from blip_scale.data.inventory import inventory
from blip_scale.data.listed import listed_pairs
from blip_scale.data.loader import TrainLoader
from blip_scale.data.probe import probe_stream
from blip_scale.data.shards import Record, write_shards
from blip_scale.data.tokenizer import (
    PackedTokens,
    load_tokenizer,
    pack_captions,
    prompt_ids,
    resolve_checkpoint,
    special_ids,
)
from blip_scale.data.transforms import (
    IMAGE_MEAN,
    IMAGE_STD,
    EvalTransform,
    TrainTransform,
    normalize_images,
)
from blip_scale.data.videos import VideoSet

__all__ = [
    "IMAGE_MEAN",
    "IMAGE_STD",
    "Batch",
    "CaptionInput",
    "Clean",
    "EvalTransform",
    "HeldoutPairs",
    "LoaderPosition",
    "PackedTokens",
    "Record",
    "TrainLoader",
    "TrainTransform",
    "VideoSet",
    "clean_caption",
    "clean_question",
    "heldout_pairs",
    "inventory",
    "listed_pairs",
    "load_tokenizer",
    "normalize_images",
    "pack_captions",
    "probe_stream",
    "prompt_ids",
    "resolve_checkpoint",
    "special_ids",
    "write_shards",
]
