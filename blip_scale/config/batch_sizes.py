"""The global batch, split over ranks and accumulation micro-steps."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from blip_scale.config.recipe import Recipe

AUTO = "auto"
"""`train.max_micro_batch_size` that is settled when a run starts."""
_CAPTION_TOKENS = 12.5
"""Mean length of captions from the web, [CLS] and [SEP] included."""


@dataclass(frozen=True)
class BatchSizes:
    """`global_batch = micro_batch * world_size * accumulation`, in pairs."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int


def batch_sizes(recipe: Recipe, world_size: int) -> BatchSizes:
    """Split the global batch over `world_size` ranks.

    A largest micro-batch of `auto` counts as none here: `settled` puts a number in its place.

    Raises:
        ValueError: it does not divide; names the sizes and the numbers of ranks that do.
    """
    train = recipe.train
    batch, stated, most = train.global_batch_size, train.micro_batch_size, _most(recipe)
    possible = possible_micro_batches(recipe, world_size)
    micro = stated or _largest(possible, most) or max(1, batch // world_size)
    unit = world_size * micro
    if stated is None and most is not None and possible and micro > most:
        raise ValueError(
            f"train.max_micro_batch_size: the {batch // world_size} pairs of each of {world_size} "
            f"ranks do not divide into micro-batches of at most {most}; possible: "
            f"train.max_micro_batch_size={possible[0]}{_other_ranks(recipe, world_size)}"
        )
    if batch % unit == 0:
        return BatchSizes(batch, micro, batch // unit, world_size)
    if stated is None:
        unit = world_size
    near = sorted({max(1, batch // unit) * unit, math.ceil(batch / unit) * unit})
    mend = f"train.global_batch_size={' or '.join(map(str, near))}"
    if possible:
        mend += f", or train.micro_batch_size={' or '.join(map(str, possible))}"
    factors = f"{world_size} ranks" + (f" * micro batch {stated}" if stated else "")
    raise ValueError(
        f"train.global_batch_size: {batch} is not a multiple of {unit} ({factors}); "
        f"possible: {mend}{_other_ranks(recipe, world_size)}"
    )


def token_bucket(recipe: Recipe, micro_batch: int, on_gpu: bool) -> int:
    """`train.pad_tokens_to` with "auto" resolved.

    On a GPU it is the largest power of two up to an eighth of the expected tokens: half a bucket
    more on average, which costs at most 3 % of a step, most of which the ViT takes. On a CPU static
    shapes gain nothing, and nothing is filled up.
    """
    stated = recipe.train.pad_tokens_to
    if stated != "auto":
        return stated
    expected = min(_CAPTION_TOKENS, recipe.model.text.max_tokens) * micro_batch
    return 2 ** max(0, math.floor(math.log2(max(1.0, expected / 8)))) if on_gpu else 1


def is_auto(recipe: Recipe) -> bool:
    """Whether the micro-batch is still to be settled by the memory of the device."""
    return recipe.train.micro_batch_size is None and recipe.train.max_micro_batch_size == AUTO


def settled(recipe: Recipe, micro_batch: int) -> Recipe:
    """The recipe with a number in place of `auto`."""
    train = dataclasses.replace(recipe.train, max_micro_batch_size=micro_batch)
    return dataclasses.replace(recipe, train=train)


def possible_micro_batches(recipe: Recipe, world_size: int) -> list[int]:
    """Sizes that make up a rank's share of the global batch, and are large enough for ITM's
    negatives; none where the batch has no equal shares."""
    share, rest = divmod(recipe.train.global_batch_size, world_size)
    least = 2 if recipe.objective.negatives == "local" else 1
    return [] if rest else [size for size in range(least, share + 1) if share % size == 0]


def _most(recipe: Recipe) -> int | None:
    """The largest micro-batch as a number, where the recipe says one."""
    most = recipe.train.max_micro_batch_size
    return most if isinstance(most, int) else None


def _largest(sizes: list[int], most: int | None) -> int | None:
    return max((size for size in sizes if most is None or size <= most), default=None)


def _other_ranks(recipe: Recipe, world_size: int) -> str:
    """The numbers of ranks nearest to this one on which the sizes work, as part of a sentence."""
    train = recipe.train

    def fits(ranks: int) -> bool:
        sizes = possible_micro_batches(recipe, ranks)
        if train.micro_batch_size is not None:
            return train.micro_batch_size in sizes
        return _largest(sizes, _most(recipe)) is not None

    able = [n for n in range(1, train.global_batch_size + 1) if n != world_size and fits(n)]
    near = sorted(able, key=lambda ranks: abs(ranks - world_size))[:6]
    return f", or {' or '.join(map(str, sorted(near)))} ranks" if near else ""
