"""The image-text pairs of ITM: matched, and hard negatives out of this rank's batch or of all.

Legend: B micro-batch of this rank, P pool of captions that negatives are drawn from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from blip_scale.data.loading.micro_batches import Batch
from blip_scale.engine import collectives
from blip_scale.model.packing import PackedText, Room, select_from_table
from blip_scale.objectives.matching import HardNegatives


@dataclass(frozen=True)
class TextSizes:
    """Static sizes of the texts of ITM, fixed before negatives are drawn."""

    max_tokens: int
    """Longest caption on any rank."""
    room: Room | None = None
    """Size that the texts of all pairs are filled up to; None: no fillers, and the host waits for
    the device once to read how many tokens were drawn."""


def text_sizes(batch: Batch, max_tokens: int, full_capacity: bool) -> TextSizes:
    """Sizes for a micro-batch on the host.

    Args:
        batch: with its padding; without one there is no room either.
        max_tokens: longest caption of the recipe.
        full_capacity: make room for any draw; otherwise for draws that stay within
            `Padding.spread`, which fail once in thousands of steps.
    """
    padding = batch.padding
    if padding.bucket == 1:
        return TextSizes(max_tokens)
    count = len(batch.ids)
    # What every batch of this bucket may hold, not what this one holds: the sizes are static.
    most = len(batch.token_ids) - 2 * padding.fillers
    fewest = max(2 * count, most - padding.bucket + 1)
    fewest_drawn, most_drawn = 2 * count, max_tokens * count
    if not full_capacity:
        fewest_drawn = max(fewest_drawn, fewest - padding.spread)
        most_drawn = min(most_drawn, most + padding.spread)
    room = Room.between(2 * fewest + fewest_drawn, 2 * most + most_drawn, max_tokens)
    return TextSizes(max_tokens, room)


class Pairs(NamedTuple):
    """The 3B image-text pairs of ITM: matched, wrong image, wrong text."""

    texts: PackedText
    image_embeds: Tensor
    image_index: Tensor
    retry: dict[str, Tensor]
    """`retry`, a fp32 scalar: 1 where the drawn texts did not fit into the room, so that the step
    has to be repeated with full capacity; empty without a room."""


def local_pairs(
    image_embeds: Tensor, text: PackedText, negatives: HardNegatives, sizes: TextSizes
) -> Pairs:
    """Negatives out of this rank's own batch."""
    own_B = torch.arange(len(image_embeds), device=image_embeds.device)
    index, retry = _chosen(text.lengths, own_B, negatives.text, sizes)
    texts = text.select(index, sizes.room)
    return Pairs(texts, image_embeds, torch.cat([own_B, negatives.image, own_B]), retry)


def global_pairs(
    image_embeds: Tensor, text: PackedText, negatives: HardNegatives, sizes: TextSizes
) -> Pairs:
    """Negatives out of the batches of all ranks; gradients go back to the rank that owns an image.

    The loss of a rank reaches image tokens of others, and the backward of the gather sums what all
    ranks send: with the mean over ranks that data parallelism takes, that is the gradient of the
    mean loss. Captions travel as a table of one width, because their lengths are not known here.
    """
    batch = len(image_embeds)
    all_embeds = collectives.all_gather_with_gradient(image_embeds)
    table = collectives.all_gather(text.table(sizes.max_tokens))
    own_B = torch.arange(batch, device=image_embeds.device)
    rows_B = own_B + collectives.rank() * batch
    index, retry = _chosen(table[:, -1], rows_B, negatives.text, sizes)
    return Pairs(
        select_from_table(table, index, sizes.room),
        torch.cat([image_embeds, all_embeds[negatives.image]]),
        torch.cat([own_B, own_B + batch, own_B]),
        retry,
    )


def _chosen(
    lengths_P: Tensor, own_B: Tensor, negatives_B: Tensor, sizes: TextSizes
) -> tuple[Tensor, dict[str, Tensor]]:
    """The captions of all pairs [3B], and `Pairs.retry`.

    Where those drawn do not fit, each pair takes its own caption: they always fit, so that every
    index of the step that is to be repeated stays valid.
    """
    index = torch.cat([own_B, own_B, negatives_B])
    if sizes.room is None:
        return index, {}
    tokens = lengths_P.index_select(0, index).sum()
    fits = sizes.room.fits(tokens, sizes.max_tokens)
    index = torch.where(fits, index, own_B.repeat(3))
    return index, {"retry": (~fits).float()}
