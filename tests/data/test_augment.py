"""RandAugment on tensors: the published ten operations, their strengths and how often they come."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from data_samples import photo
from PIL import Image, ImageOps
from torch import Tensor

from blip_scale.data import augment
from tools import published_transform

NAMES = list(published_transform.OPERATIONS)


def planes(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def applied(name: str, image: Image.Image, sign: int = 1) -> np.ndarray:
    operation = augment.OPERATIONS[NAMES.index(name)]
    return operation(planes(image), sign).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", NAMES)
def test_operations_do_what_the_published_ones_do(name: str, sign: int) -> None:
    for image in (photo(64, 48), photo(33, 50), Image.effect_noise((40, 40), 20).convert("RGB")):
        expected = published_transform.OPERATIONS[name](np.array(image), sign)
        difference = np.abs(applied(name, image, sign).astype(int) - expected)
        assert difference.max() <= 1, "one grey level, from rounding"
        assert (difference > 0).mean() < 0.1
        changes = name not in ("identity", "brightness", "sharpness")
        assert np.array_equal(expected, np.array(image)) != changes


def test_contrast_and_equalisation_are_pillows() -> None:
    dark = Image.fromarray((np.asarray(photo()) // 4 + 9).astype(np.uint8))
    assert np.array_equal(applied("auto_contrast", dark), np.array(ImageOps.autocontrast(dark)))
    assert np.array_equal(applied("equalize", dark), np.array(ImageOps.equalize(dark)))
    flat = Image.new("RGB", (20, 20), (7, 7, 200))
    for name in ("auto_contrast", "equalize"):
        assert np.array_equal(applied(name, flat), np.array(flat))


def test_operations_leave_their_input_alone() -> None:
    image = planes(photo())
    before = image.clone()
    for operation in augment.OPERATIONS:
        result = operation(image, 1)
        assert torch.equal(image, before)
        assert result.is_contiguous() and result.dtype == torch.uint8


def test_tiny_images_are_augmented_too() -> None:
    for operation in augment.OPERATIONS:
        for sign in (1, -1):
            assert operation(torch.zeros(3, 2, 1, dtype=torch.uint8), sign).shape == (3, 2, 1)


def test_two_of_ten_operations_are_applied_half_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(augment.OPERATIONS) == 10 and augment.ENHANCE_FACTOR == 1.0
    calls: list[tuple[int, int]] = []

    def recording(number: int) -> object:
        return lambda image, sign: (calls.append((number, sign)), image)[1]

    monkeypatch.setattr(augment, "OPERATIONS", tuple(recording(i) for i in range(10)))
    image, rng, per_image = planes(photo()), np.random.default_rng(0), Counter()
    for _ in range(4000):
        before = len(calls)
        augment.rand_augment(image, rng)
        per_image[len(calls) - before] += 1
    assert abs(per_image[0] - 1000) < 120 and abs(per_image[2] - 1000) < 120
    counts = Counter(number for number, _ in calls)
    assert len(counts) == 10 and all(abs(count - 400) < 100 for count in counts.values())
    assert abs(sum(sign for _, sign in calls)) < 250
