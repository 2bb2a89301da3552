"""RandAugment: the published ten operations, their strengths and frequencies."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from data_samples import photo
from PIL import Image, ImageOps

from blip_scale.data.pixels import augment
from tools.benchmarks import published_transform

NAMES = list(published_transform.OPERATIONS)


def applied(name: str, image: Image.Image, sign: int = 1) -> np.ndarray:
    operation = augment.OPERATIONS[NAMES.index(name)]
    return operation(np.array(image), sign)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", NAMES)
def test_operations_do_what_the_published_ones_do(name: str, sign: int) -> None:
    for image in (photo(64, 48), photo(33, 50), Image.effect_noise((40, 40), 20).convert("RGB")):
        expected = published_transform.OPERATIONS[name](np.array(image), sign)
        assert np.array_equal(applied(name, image, sign), expected)
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
    image = np.array(photo())
    before = image.copy()
    for operation in augment.OPERATIONS:
        result = operation(image, 1)
        assert np.array_equal(image, before)
        assert result.flags.c_contiguous and result.dtype == np.uint8


def test_tiny_images_are_augmented_too() -> None:
    for operation in augment.OPERATIONS:
        for sign in (1, -1):
            assert operation(np.zeros((2, 1, 3), np.uint8), sign).shape == (2, 1, 3)


def test_two_of_ten_operations_are_applied_half_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(augment.OPERATIONS) == 10 and augment.ENHANCE_FACTOR == 1.0
    calls: list[tuple[int, int]] = []

    def recording(number: int) -> object:
        return lambda image, sign: (calls.append((number, sign)), image)[1]

    monkeypatch.setattr(augment, "OPERATIONS", tuple(recording(i) for i in range(10)))
    image, rng, per_image = np.array(photo()), np.random.default_rng(0), Counter()
    for _ in range(4000):
        before = len(calls)
        augment.rand_augment(image, rng)
        per_image[len(calls) - before] += 1
    assert abs(per_image[0] - 1000) < 120 and abs(per_image[2] - 1000) < 120
    counts = Counter(number for number, _ in calls)
    assert len(counts) == 10 and all(abs(count - 400) < 100 for count in counts.values())
    assert abs(sum(sign for _, sign in calls)) < 250
