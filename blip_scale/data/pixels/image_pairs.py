"""Random swap of the two images of a pair (NLVR2, as published)."""

from __future__ import annotations

import numpy as np
from torch import Tensor

_OTHER_SIDE = {"left": "right", "right": "left"}


def maybe_swap(images: Tensor, sentence: str, rng: np.random.Generator) -> tuple[Tensor, str]:
    """Swap both images, and the words left and right in the sentence, with probability 0.5.

    Args:
        images: [2, 3, H, W].
        sentence: text about both images.
        rng: generator of the random choice.
    """
    if rng.random() < 0.5:
        return images, sentence
    words = [_OTHER_SIDE.get(word, word) for word in sentence.split(" ")]
    return images.flip(0), " ".join(words)
