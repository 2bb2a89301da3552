"""Conversion of images and captions to inputs of a network, on its device and in its dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blip_scale.data.loading.micro_batches import Batch
from blip_scale.data.pixels.transforms import normalize_images
from blip_scale.data.tokenizer import PackedTokens
from blip_scale.model.attention import Segments
from blip_scale.model.packing import PackedText


def to_pixels(images: Tensor, network: nn.Module) -> Tensor:
    """Normalise images and move them to the network.

    Args:
        images: uint8 [B, 3, H, W].
        network: network whose first parameter gives device and dtype.

    Returns:
        [B, 3, H, W] in the dtype of the network.
    """
    parameter = next(network.parameters())
    return normalize_images(images.to(parameter.device), parameter.dtype)


def packed_text(packed: PackedTokens, device: torch.device) -> PackedText:
    """Move packed token ids to a device."""
    segments = Segments(packed.offsets, packed.max_length)
    return PackedText(packed.token_ids, segments, packed.padding.fillers).to(device)


def to_model_input(
    batch: Batch, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, PackedText]:
    """Move a batch to a device.

    Returns:
        Normalised images [B, 3, H, W] in `dtype`, and packed captions.
    """
    batch = batch.to(device)
    segments = Segments(batch.offsets, batch.max_length)
    text = PackedText(batch.token_ids, segments, batch.padding.fillers)
    return normalize_images(batch.images, dtype), text
