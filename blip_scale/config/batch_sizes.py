"""Split the global batch over ranks and accumulation micro-steps."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from blip_scale.config.recipe import Recipe

AUTO = "auto"
"""Value of `train.max_micro_batch_size` that is replaced by a number when a run starts."""
_CAPTION_TOKENS = 12.5
"""Mean number of tokens in captions from the web, [CLS] and [SEP] included."""


@dataclass(frozen=True)
class BatchSizes:
    """Batch sizes in pairs: `global_batch = micro_batch * world_size * accumulation`."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int


def batch_sizes(recipe: Recipe, world_size: int) -> BatchSizes:
    """Split the global batch over `world_size` ranks.

    A `train.max_micro_batch_size` of `auto` is treated as null. `settled` replaces it by a number.

    Raises:
        ValueError: the global batch does not divide evenly. The message names sizes and numbers of
            ranks that do.
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
    fix = f"train.global_batch_size={' or '.join(map(str, near))}"
    if possible:
        fix += f", or train.micro_batch_size={' or '.join(map(str, possible))}"
    factors = f"{world_size} ranks" + (f" * micro batch {stated}" if stated else "")
    raise ValueError(
        f"train.global_batch_size: {batch} is not a multiple of {unit} ({factors}); "
        f"possible: {fix}{_other_ranks(recipe, world_size)}"
    )


def token_bucket(recipe: Recipe, micro_batch: int, on_gpu: bool) -> int:
    """Resolve `train.pad_tokens_to`, whose default is "auto".

    On a GPU, auto is the largest power of two up to one eighth of the expected tokens. Padding adds
    half a bucket on average. This costs at most 3 % of a step, because the ViT takes most of the
    time. On a CPU, static shapes have no benefit, so auto is 1 (no padding).
    """
    stated = recipe.train.pad_tokens_to
    if stated != "auto":
        return stated
    expected = min(_CAPTION_TOKENS, recipe.model.text.max_tokens) * micro_batch
    return 2 ** max(0, math.floor(math.log2(max(1.0, expected / 8)))) if on_gpu else 1


def is_auto(recipe: Recipe) -> bool:
    """Return True if the micro-batch size is still to be chosen from the device's memory."""
    return recipe.train.micro_batch_size is None and recipe.train.max_micro_batch_size == AUTO


def settled(recipe: Recipe, micro_batch: int) -> Recipe:
    """Copy the recipe with a number in place of `auto`."""
    train = dataclasses.replace(recipe.train, max_micro_batch_size=micro_batch)
    return dataclasses.replace(recipe, train=train)


def possible_micro_batches(recipe: Recipe, world_size: int) -> list[int]:
    """Micro-batch sizes that divide a rank's share of the global batch.

    They are large enough for ITM's hard negatives. The list is empty if the global batch does not
    divide evenly among the ranks.
    """
    share, rest = divmod(recipe.train.global_batch_size, world_size)
    least = 2 if recipe.objective.itm == "local" else 1
    return [] if rest else [size for size in range(least, share + 1) if share % size == 0]


def _most(recipe: Recipe) -> int | None:
    """Largest micro-batch size, if the recipe gives a number."""
    most = recipe.train.max_micro_batch_size
    return most if isinstance(most, int) else None


def _largest(sizes: list[int], most: int | None) -> int | None:
    return max((size for size in sizes if most is None or size <= most), default=None)


def _other_ranks(recipe: Recipe, world_size: int) -> str:
    """Suggest the nearest numbers of ranks that fit the batch sizes, as part of a sentence."""
    train = recipe.train

    def fits(ranks: int) -> bool:
        sizes = possible_micro_batches(recipe, ranks)
        if train.micro_batch_size is not None:
            return train.micro_batch_size in sizes
        return _largest(sizes, _most(recipe)) is not None

    able = [n for n in range(1, train.global_batch_size + 1) if n != world_size and fits(n)]
    near = sorted(able, key=lambda ranks: abs(ranks - world_size))[:6]
    return f", or {' or '.join(map(str, sorted(near)))} ranks" if near else ""
