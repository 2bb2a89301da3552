"""The image-text pairs of ITM: matched pairs, and hard negatives of this rank or of all ranks.

Legend: B micro-batch of this rank, P pool of captions from which negatives are drawn.
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
    """Static sizes of ITM's texts, fixed before negatives are drawn."""

    max_tokens: int
    """Upper bound of a caption's tokens on all ranks."""
    room: Room | None = None
    """Size to which the texts of all pairs are padded. None: no padding; the host then waits for
    the device once, to read how many tokens were drawn."""


def text_sizes(batch: Batch, max_tokens: int, full_capacity: bool) -> TextSizes:
    """Compute the sizes for a micro-batch on the host.

    Args:
        batch: the micro-batch. If it has no padding, neither have the texts of ITM.
        max_tokens: maximum number of tokens of a caption in the recipe.
        full_capacity: whether the size must fit every possible draw. Otherwise it fits draws
            within `Padding.spread`, which overflow once in thousands of steps.
    """
    padding = batch.padding
    if padding.bucket == 1:
        return TextSizes(max_tokens)
    count = len(batch.ids)
    # Static sizes must be equal for all batches of this bucket, so use the bucket's bounds.
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
    """Entry `retry`, an fp32 scalar. It is 1 if the drawn texts overflowed the room and the step
    must be repeated with full capacity. Empty without a room."""


def local_pairs(
    image_embeds: Tensor, text: PackedText, negatives: HardNegatives, sizes: TextSizes
) -> Pairs:
    """Form pairs with negatives from this rank's batch."""
    own_B = torch.arange(len(image_embeds), device=image_embeds.device)
    index, retry = _chosen(text.lengths, own_B, negatives.text, sizes)
    texts = text.select(index, sizes.room)
    return Pairs(texts, image_embeds, torch.cat([own_B, negatives.image, own_B]), retry)


def global_pairs(
    image_embeds: Tensor, text: PackedText, negatives: HardNegatives, sizes: TextSizes
) -> Pairs:
    """Form pairs with negatives from all ranks. Gradients flow to the rank of each image.

    A rank's loss depends on image tokens of other ranks. The backward of the gather sums the
    gradients of all ranks, then data parallelism averages over ranks. The result is the gradient
    of the mean loss. Captions are exchanged as a table of fixed width, because the lengths of
    other ranks' captions are not known here.
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
    """Return the indices [3B] of the captions of all pairs, and `Pairs.retry`.

    If the drawn captions overflow the room, each pair takes its matching caption, which always
    fits. All indices are then valid in the step that will be repeated.
    """
    index = torch.cat([own_B, own_B, negatives_B])
    if sizes.room is None:
        return index, {}
    tokens = lengths_P.index_select(0, index).sum()
    fits = sizes.room.fits(tokens, sizes.max_tokens)
    index = torch.where(fits, index, own_B.repeat(3))
    return index, {"retry": (~fits).float()}
