"""Texts that speak of two images: their order is a matter of chance (NLVR2, as published)."""

from __future__ import annotations

import numpy as np
from torch import Tensor

_OTHER_SIDE = {"left": "right", "right": "left"}


def maybe_swap(images: Tensor, sentence: str, rng: np.random.Generator) -> tuple[Tensor, str]:
    """With probability one half both images swapped, and the words left and right of the sentence
    with them.

    Args:
        images: [2, 3, H, W].
    """
    if rng.random() < 0.5:
        return images, sentence
    words = [_OTHER_SIDE.get(word, word) for word in sentence.split(" ")]
    return images.flip(0), " ".join(words)
