"""The published transforms: crops, the ten operations and their strengths."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from blip_scale.data import EvalTransform, TrainTransform, transforms


def photo(width: int = 64, height: int = 48) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([40 + columns * 2, 60 + rows * 3, 90 + (rows + columns)], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def operation(name: str, image: Image.Image, sign: int = 1) -> np.ndarray:
    return np.asarray(getattr(transforms, f"_{name}")(image, sign))


def warped(image: Image.Image, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear samples at whole-number pixel coordinates, NaN outside: what OpenCV's warpAffine
    takes.
    """
    pixels = np.asarray(image).astype(np.float64)
    height, width, _ = pixels.shape
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    x0, y0 = (
        np.clip(np.floor(x).astype(int), 0, width - 2),
        np.clip(np.floor(y).astype(int), 0, height - 2),
    )
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    top = pixels[y0, x0] * (1 - fx) + pixels[y0, x0 + 1] * fx
    bottom = pixels[y0 + 1, x0] * (1 - fx) + pixels[y0 + 1, x0 + 1] * fx
    result = top * (1 - fy) + bottom * fy
    result[~inside] = np.nan
    return result


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"])
def test_warps_have_the_published_strength(name: str, sign: int) -> None:
    image = photo()
    y, x = np.mgrid[0 : image.height, 0 : image.width].astype(np.float64)
    angle = np.deg2rad(15.0 * sign)
    dx, dy = x - image.width / 2, y - image.height / 2
    source = {
        "shear_x": (x - 0.15 * sign * y, y),
        "shear_y": (x, y - 0.15 * sign * x),
        "translate_x": (x + 5 * sign, y),
        "translate_y": (x, y + 5 * sign),
        "rotate": (
            image.width / 2 + np.cos(angle) * dx - np.sin(angle) * dy,
            image.height / 2 + np.sin(angle) * dx + np.cos(angle) * dy,
        ),
    }[name]
    result, expected = operation(name, image, sign), warped(image, *source)
    inside = ~np.isnan(expected)
    assert np.abs(result[inside] - expected[inside]).max() <= 1.5
    far_outside = np.isnan(warped(image, source[0], source[1])[..., 0])
    assert (result[far_outside] == 128).mean() > 0.85, "filled with 128 (its edge is interpolated)"


def test_brightness_and_sharpness_change_nothing_at_this_magnitude() -> None:
    image = photo()
    assert transforms.ENHANCE_FACTOR == 1.0
    for name in ("identity", "brightness", "sharpness"):
        assert np.array_equal(operation(name, image), np.asarray(image))


def test_auto_contrast_stretches_as_pil_does() -> None:
    image = (
        photo()
    )  # every channel's minimum is above 0: the published version drives these to white
    result = operation("auto_contrast", image)
    assert np.array_equal(result, np.asarray(ImageOps.autocontrast(image)))
    assert result.min(axis=(0, 1)).tolist() == [0, 0, 0]
    assert result.max(axis=(0, 1)).tolist() == [255, 255, 255]
    assert 100 < result.mean() < 155


def test_equalize_spreads_the_levels() -> None:
    dark = Image.fromarray((np.asarray(photo()) // 4).astype(np.uint8))
    result = operation("equalize", dark)
    assert np.array_equal(result, np.asarray(ImageOps.equalize(dark)))
    assert result.max() == 255 > np.asarray(dark).max()


def test_two_of_ten_operations_are_applied_half_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(transforms.OPERATIONS) == 10
    calls: list[tuple[int, int]] = []

    def recording(number: int) -> object:
        return lambda image, sign: (calls.append((number, sign)), image)[1]

    monkeypatch.setattr(transforms, "OPERATIONS", tuple(recording(i) for i in range(10)))
    image, rng, per_image = photo(), np.random.default_rng(0), Counter()
    for _ in range(4000):
        before = len(calls)
        transforms.rand_augment(image, rng)
        per_image[len(calls) - before] += 1
    assert [round(per_image[n] / 4000, 1) for n in range(3)] == [0.2, 0.5, 0.2] or (
        abs(per_image[0] - 1000) < 120 and abs(per_image[2] - 1000) < 120
    )
    counts = Counter(number for number, _ in calls)
    assert len(counts) == 10 and all(abs(count - 400) < 100 for count in counts.values())
    assert abs(sum(sign for _, sign in calls)) < 250


def test_crops_have_the_published_area_and_aspect() -> None:
    rng = np.random.default_rng(0)
    areas, centres = [], []
    for _ in range(3000):
        left, top, right, bottom = transforms.random_crop_box((400, 300), 0.2, rng)
        assert 0 <= left < right <= 400 and 0 <= top < bottom <= 300
        assert 0.74 < (right - left) / (bottom - top) < 1.35
        areas.append((right - left) * (bottom - top) / 120_000)
        centres.append((left + right) / 2)
    assert min(areas) > 0.199 and max(areas) > 0.9
    assert abs(np.mean(centres) - 200) < 5


@pytest.mark.parametrize(
    ("size", "box"),
    [((1000, 10), (494, 0, 507, 10)), ((10, 1000), (0, 494, 10, 507)), ((1, 1), (0, 0, 1, 1))],
)
def test_extreme_images_are_cropped_in_the_middle(
    size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    crop = transforms.random_crop_box(size, 0.2, np.random.default_rng(0))
    assert np.abs(np.subtract(crop, box)).max() <= 1


def test_training_images_are_a_function_of_the_generator() -> None:
    transform = TrainTransform(size=32)
    torch.manual_seed(0)
    np.random.seed(0)
    images = [transform(photo(), np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert images[0].shape == (3, 32, 32) and images[0].dtype == torch.uint8
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_half_of_the_images_are_flipped() -> None:
    transform = TrainTransform(size=16, min_scale=1.0, augment=False)
    square = photo(48, 48)  # red grows to the right
    images = [transform(square, np.random.default_rng(seed)).float() for seed in range(400)]
    flipped = sum(bool(image[0, :, 0].mean() > image[0, :, -1].mean()) for image in images)
    assert 160 < flipped < 240
    never = TrainTransform(size=16, flip=False, augment=False)
    assert all(
        (image := never(square, np.random.default_rng(seed)).float())[0, :, 0].mean()
        < image[0, :, -1].mean()
        for seed in range(50)
    )


def test_evaluation_squeezes_to_a_square() -> None:
    image = photo(90, 30)
    result = EvalTransform(30)(image)
    expected = np.asarray(image.resize((30, 30), Image.Resampling.BICUBIC))
    assert np.array_equal(result.permute(1, 2, 0).numpy(), expected)
