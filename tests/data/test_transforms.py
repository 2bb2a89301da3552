"""The published transforms, and the fast paths, which show the same picture."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from data_samples import photo, saved
from PIL import Image, ImageOps
from skimage import data as photos
from torch import Tensor

from blip_scale.data.pixels import transforms
from blip_scale.data.pixels.transforms import EvalTransform, TrainTransform

Way = Literal["fast", "exact", "published"]
PHOTOS = ("astronaut", "chelsea", "coffee", "ihc", "motorcycle_left")


def real_photo(name: str, width: int, height: int) -> bytes:
    with Image.open(Path(photos.__file__).parent / f"{name}.png") as image:
        return saved(ImageOps.fit(image.convert("RGB"), (width, height)), "JPEG", quality=90)


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
    transform, encoded = TrainTransform(size=32), saved(photo(), "JPEG")
    torch.manual_seed(0)
    np.random.seed(0)
    images = [transform(encoded, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert images[0].shape == (3, 32, 32) and images[0].dtype == torch.uint8
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_half_of_the_images_are_flipped() -> None:
    square = saved(photo(48, 48), "JPEG")  # red grows to the right

    def grows(transform: TrainTransform, seed: int) -> bool:
        image = transform(square, np.random.default_rng(seed)).float()
        return bool(image[0, :, 0].mean() < image[0, :, -1].mean())

    sometimes = TrainTransform(size=16, min_scale=1.0, augment=False)
    assert 160 < sum(not grows(sometimes, seed) for seed in range(400)) < 240
    never = TrainTransform(size=16, flip=False, augment=False)
    assert all(grows(never, seed) for seed in range(50))


@pytest.mark.parametrize("augment", [False, True], ids=["crop", "augment"])
@pytest.mark.parametrize("size", [(500, 375), (640, 480), (1280, 960)])
def test_the_fast_paths_show_the_published_picture(size: tuple[int, int], augment: bool) -> None:
    """All paths draw the same crop, flip and operations; 60 dB is a quarter of a grey level (rms).

    Pillow resizes columns first if that is cheaper, which costs up to one grey level (55 dB);
    equalisation multiplies it. `fast` moves the edges of the crop to even pixels if it decodes at
    1/2: a shift of at most one source pixel, but many dB.
    """
    squares: dict[str, list[float]] = {"exact": [], "fast": []}
    for number, name in enumerate(PHOTOS):
        encoded = real_photo(name, *size)
        for seed in range(6):
            images, states = {}, []
            for path in ("published", "exact", "fast"):
                rng = np.random.default_rng((number, seed))
                transform = TrainTransform(224, augment=augment, path=path)
                images[path] = transform(encoded, rng).float()
                states.append(rng.bit_generator.state)
            assert states[0] == states[1] == states[2], "the same draws"
            for path, errors in squares.items():
                errors.append(float((images[path] - images["published"]).square().mean()))
    assert decibels(squares["exact"]) >= (55 if augment else 60)
    assert decibels(squares["fast"]) >= (55 if size == (500, 375) else 30)


def test_decoding_smaller_keeps_the_picture() -> None:
    """Crops on even pixels equal those of the full size; others shift by at most a pixel."""
    encoded = real_photo("coffee", 1280, 960)
    pixels = transforms.decode_jpeg(encoded, (1280, 960))
    half = transforms.decode_jpeg(encoded, (1280, 960), 2)
    whole = resized(pixels[100:900, 200:1000])
    assert decibels([float((resized(half[50:450, 100:500]) - whole).square().mean())]) > 40


def decibels(squared_errors: list[float]) -> float:
    """Peak signal-to-noise ratio in dB."""
    return float(10 * np.log10(255**2 / np.mean(squared_errors)))


def resized(pixels: np.ndarray) -> Tensor:
    image = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)
    return transforms.to_tensor(image).float()


def test_only_crops_that_stay_large_are_decoded_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    divisors = []

    def recording(
        encoded: bytes, size: tuple[int, int], divisor: int, buffer: np.ndarray
    ) -> np.ndarray:
        divisors.append(divisor)
        pixels = transforms.decode_image(encoded).reduce(divisor)
        return np.array(pixels)

    monkeypatch.setattr(transforms, "decode_jpeg", recording)
    for width, path in [(99, "fast"), (130, "fast"), (300, "fast"), (999, "fast"), (999, "exact")]:
        transform = TrainTransform(64, min_scale=1.0, path=path)
        transform(saved(photo(width, width), "JPEG"), np.random.default_rng(0))
    assert divisors == [1, 2, 4, 8, 1]


@pytest.mark.parametrize("path", ["fast", "exact", "published"])
@pytest.mark.parametrize("size", [(1, 1), (3, 700), (700, 3), (16, 16)])
def test_odd_sizes_are_transformed(size: tuple[int, int], path: Way) -> None:
    for seed in range(5):
        image = TrainTransform(16, path=path)(saved(photo(*size), "JPEG"), generator(seed))
        assert image.shape == (3, 16, 16) and image.is_contiguous()


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_evaluation_squeezes_to_a_square() -> None:
    image = photo(90, 30)
    result = EvalTransform(30)(image)
    expected = np.asarray(image.resize((30, 30), Image.Resampling.BICUBIC))
    assert np.array_equal(result.permute(1, 2, 0).numpy(), expected)
