"""Checks of the arguments that a program passes to a loaded BLIP. Errors name the value and fix.

PyTorch would broadcast or cast most wrong inputs and return wrong results without an error.

Shapes: I images, N image tokens, D width, S texts.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from blip_scale.config.bounds import MOST_BEAMS


def check_pixels(pixels: Any, size: int) -> None:
    """Check that `pixels` are uint8 [I, 3, size, size].

    Raises:
        ValueError: type, dtype or shape is wrong.
    """
    if isinstance(pixels, Tensor):
        shape = (3, size, size)
        if pixels.dtype == torch.uint8 and pixels.ndim == 4 and tuple(pixels.shape[1:]) == shape:
            return
        problem = f"{_name(pixels.dtype)} {list(pixels.shape)}"
    else:
        problem = f"a {type(pixels).__module__.partition('.')[0]} {type(pixels).__name__}"
    raise ValueError(
        f"pixels: expected a torch tensor, uint8 [images, 3, {size}, {size}], found {problem}; "
        "make it with torch.stack([pixels_of(image, blip.image_size) for image in images]), which "
        "takes PIL images and the bytes of image files (blip_scale.inference.images)"
    )


def check_tokens(tokens: Any, width: int, like: Tensor) -> None:
    """Check that `tokens` are [I, N, width], with the dtype and on the device of `like`.

    Raises:
        ValueError: shape, dtype or device is wrong.
    """
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[2] != width:
        shape = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(
            f"image_embeds: expected the tensor [images, tokens, {width}] that blip.image_embeds "
            f"returns, found {shape}"
        )
    if (tokens.dtype, tokens.device) != (like.dtype, like.device):
        raise ValueError(
            f"image_embeds: {_name(tokens.dtype)} on {tokens.device}, but the network is "
            f"{_name(like.dtype)} on {like.device}; give image_embeds.to(blip.device, blip.dtype)"
        )


def check_beams(beams: int) -> None:
    """Raise ValueError for fewer than 1 or more than `MOST_BEAMS` beams.

    The limit bounds the time and memory of a search.
    """
    if not 1 <= beams <= MOST_BEAMS:
        raise ValueError(f"num_beams: {beams}: expected 1 to {MOST_BEAMS}")


def check_draws(draws: Tensor | None, images: int, length: int) -> None:
    """Check that `draws` are [images, length] or longer. None is allowed.

    Raises:
        ValueError: the shape is wrong.
    """
    if draws is not None and (len(draws) != images or draws.shape[1] < length):
        raise ValueError(
            f"draws: expected [{images}, {length}], a row for each image, found "
            f"{list(draws.shape)}; make them with draws_of"
        )


def texts_of(texts: str | Iterable[str], name: str = "texts") -> list[str]:
    """List the texts; a single str counts as one text. `name` is the argument's name for errors.

    Raises:
        ValueError: an item is not a str.
    """
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Iterable):
        raise ValueError(f"{name}: expected a str or several, found {type(texts).__name__}")
    texts = list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}: item {number} is {type(text).__name__}, not str")
    return texts


def paths_of(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str]:
    """List the paths; a single path counts as a list of one."""
    if isinstance(paths, str | os.PathLike):
        return [os.fspath(paths)]
    return [os.fspath(path) for path in paths]


def owner_index(
    owners: Sequence[int] | Tensor, texts: int, images: int, device: torch.device
) -> Tensor:
    """Return the image of each text, int64 [S].

    Raises:
        ValueError: the number of owners differs from `texts`, or one is not an index of an image.
    """
    try:
        numbers = [operator.index(owner) for owner in owners]
    except TypeError as error:
        raise ValueError(
            f"owners: expected the index of an image for each text ({error})"
        ) from error
    if len(numbers) != texts:
        raise ValueError(
            f"owners: {len(numbers)} for {texts} text{'s' * (texts != 1)}; give the index of the "
            "image of each text"
        )
    for place, number in enumerate(numbers):
        if not 0 <= number < images:
            raise ValueError(
                f"owners: {number} (item {place}) is not the index of one of {images} "
                f"image{'s' * (images != 1)}; the first image is 0"
            )
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def _name(value: torch.dtype) -> str:
    return str(value).removeprefix("torch.")
