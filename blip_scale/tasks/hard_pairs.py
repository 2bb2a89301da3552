"""The image-text pairs of ITM: matched, and hard negatives out of this rank's batch or of all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from blip_scale.engine import collectives
from blip_scale.model.attention import Segments
from blip_scale.model.packing import PackedText
from blip_scale.objectives.matching import HardNegatives


class Pairs(NamedTuple):
    """The 3B image-text pairs of ITM: matched, wrong image, wrong text."""

    texts: PackedText
    image_embeds: Tensor
    image_index: Tensor


def local_pairs(image_embeds: Tensor, text: PackedText, negatives: HardNegatives) -> Pairs:
    """Negatives out of this rank's own batch."""
    own = torch.arange(len(image_embeds), device=image_embeds.device)
    texts = PackedText.concatenate([text, text, text.select(negatives.text)])
    return Pairs(texts, image_embeds, torch.cat([own, negatives.image, own]))


def global_pairs(image_embeds: Tensor, text: PackedText, negatives: HardNegatives) -> Pairs:
    """Negatives out of the batches of all ranks; gradients go back to the rank that owns an image.

    The loss of a rank reaches image tokens of others, and the backward of the gather sums what all
    ranks send: with the mean over ranks that data parallelism takes, that is the gradient of the
    mean loss.
    """
    batch = len(image_embeds)
    all_embeds = collectives.all_gather_with_gradient(image_embeds)
    token_ids = torch.cat(collectives.all_gather_ragged(text.token_ids))
    lengths = collectives.all_gather(text.segments.lengths).tolist()
    all_text = PackedText(token_ids, Segments.from_lengths(lengths, token_ids.device))
    own = torch.arange(batch, device=image_embeds.device)
    return Pairs(
        PackedText.concatenate([text, text, all_text.select(negatives.text)]),
        torch.cat([image_embeds, all_embeds[negatives.image]]),
        torch.cat([own, own + batch, own]),
    )
