"""The fast decoder and Pillow give the same pixels and refuse the same files."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from data_samples import jpeg, photo, saved
from PIL import Image

from blip_scale.data.pixels.decoding import decode_image, decode_jpeg, jpeg_size
from blip_scale.data.pixels.transforms import TrainTransform
from blip_scale.data.reading.stream_store import CorruptSample


def fast(encoded: bytes) -> np.ndarray | str:
    size = jpeg_size(encoded)
    assert size is not None
    try:
        return decode_jpeg(encoded, size)
    except CorruptSample as error:
        return str(error)


def slow(encoded: bytes) -> np.ndarray | str:
    try:
        return np.array(decode_image(encoded))
    except CorruptSample as error:
        return str(error)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn, which the published code ignores
    return saved(photo(51, 37), "JPEG", exif=exif)


@pytest.mark.parametrize(
    "encoded",
    [
        saved(photo(51, 37), "JPEG", quality=90),
        saved(photo(51, 37), "JPEG", quality=30, subsampling=0),
        saved(photo(51, 37), "JPEG", progressive=True),
        saved(photo(51, 37).convert("L"), "JPEG"),
        saved(photo(1, 1), "JPEG"),
        rotated(),
        jpeg(3),
    ],
    ids=["420", "444", "progressive", "grey", "one_pixel", "exif", "noise"],
)
def test_jpegs_decode_to_the_same_pixels(encoded: bytes) -> None:
    assert np.array_equal(fast(encoded), slow(encoded))


@pytest.mark.parametrize("divisor", [2, 4, 8])
def test_a_jpeg_decodes_smaller(divisor: int) -> None:
    encoded = saved(photo(203, 101), "JPEG", quality=95)
    small = decode_jpeg(encoded, (203, 101), divisor)
    assert small.shape == (-(-101 // divisor), -(-203 // divisor), 3)
    reduced = np.array(photo(203, 101).reduce(divisor)).astype(int)
    assert np.abs(small[:-1, :-1] - reduced[:-1, :-1]).mean() < 3


def test_other_images_are_left_to_pillow() -> None:
    others = [
        saved(photo(), "PNG"),
        saved(photo(), "WEBP"),
        saved(photo().convert("CMYK"), "JPEG"),
        saved(photo().convert("P"), "PNG"),
        saved(photo().convert("RGBA"), "PNG"),
    ]
    for encoded in others:
        assert jpeg_size(encoded) is None
        fast_pixels = TrainTransform(16, path="fast")(encoded, np.random.default_rng(0))
        published = TrainTransform(16, path="published")(encoded, np.random.default_rng(0))
        assert np.abs(fast_pixels.int() - published.int()).max() <= 2


def test_damaged_jpegs_fare_alike_in_both_decoders() -> None:
    """A truncated or damaged JPEG is corrupt for both decoders, or gives the same pixels."""
    rng, kinds = np.random.default_rng(0), set()
    encoded = saved(photo(51, 37), "JPEG", quality=90)
    for number in range(300):
        damaged = bytearray(encoded)
        at = int(rng.integers(3, len(damaged) - 8))
        if number % 3 == 0:
            damaged = damaged[:at]
        elif number % 3 == 1:
            damaged[at] ^= 1 << rng.integers(8)
        else:
            damaged[at : at + 8] = bytes(8)
        if jpeg_size(bytes(damaged)) is None:
            continue
        ours, expected = fast(bytes(damaged)), slow(bytes(damaged))
        kinds.add(type(ours))
        assert type(ours) is type(expected)
        assert ours == expected if isinstance(ours, str) else np.array_equal(ours, expected)
    assert kinds == {str, np.ndarray}


@pytest.mark.parametrize("path", ["fast", "exact", "published"])
@pytest.mark.parametrize(
    "encoded",
    [b"", b"<html>not found</html>", b"\xff\xd8\xff", saved(photo(), "JPEG")[:-300]],
    ids=["empty", "html", "header", "truncated"],
)
def test_every_path_refuses_what_is_no_whole_image(encoded: bytes, path: str) -> None:
    with pytest.raises(CorruptSample):
        TrainTransform(16, path=path)(encoded, np.random.default_rng(0))  # type: ignore[arg-type]


def test_a_decompression_bomb_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = saved(photo(100, 100), "JPEG")
    assert jpeg_size(encoded) == (100, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    assert jpeg_size(encoded) is None
    with pytest.raises(CorruptSample, match="more than max_pixels"):
        TrainTransform(16)(encoded, np.random.default_rng(0))
    assert Image.open(io.BytesIO(saved(photo(60, 60), "JPEG"))).size == (60, 60)


def encoded_as(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_transparency_goes_onto_white() -> None:
    """Hidden pixels are red; half transparent ones show half of their blue."""
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[:, :2] = (255, 0, 0, 0)
    pixels[:, 2:4] = (0, 0, 255, 128)
    pixels[:, 4:] = (10, 20, 30, 255)
    shown = np.asarray(decode_image(encoded_as(Image.fromarray(pixels), "PNG")))
    assert (shown[:, :2] == 255).all() and (shown[:, 4:] == (10, 20, 30)).all()
    assert abs(shown[0, 2].astype(int) - (127, 127, 255)).max() <= 1
    for mode in ("LA", "P"):
        grey = Image.fromarray(pixels).convert("LA")
        if mode == "P":
            palette = Image.new("P", (4, 4), 0)
            palette.putpalette([0, 0, 0, 9, 9, 9])
            data = encoded_as(palette, "PNG", transparency=0)
        else:
            data = encoded_as(grey, "PNG")
        assert np.asarray(decode_image(data))[0, 0].tolist() == [255, 255, 255]


def test_opaque_alpha_changes_nothing() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    opaque = Image.fromarray(rgb).convert("RGBA")
    assert (np.asarray(decode_image(encoded_as(opaque, "PNG"))) == rgb).all()


def test_deep_greys_are_scaled_by_their_type() -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        shown = np.asarray(decode_image(encoded_as(Image.fromarray(values), kind)))
        assert shown[0, :, 0].tolist() == [0, 1, 128, 255]
    whole = np.array([[0, 2**30, 2**31 - 1]], np.int32)
    shown = np.asarray(decode_image(encoded_as(Image.fromarray(whole), "TIFF")))
    assert shown[0, :, 1].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("values", "shown"),
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 127.0, 255.0], [0, 127, 255])],
)
def test_floating_point_pixels(values: list[float], shown: list[int]) -> None:
    image = Image.fromarray(np.array([values], np.float32))
    assert np.asarray(decode_image(encoded_as(image, "TIFF")))[0, :, 2].tolist() == shown


@pytest.mark.parametrize("values", [[-1.0, 0.0], [0.0, 4096.0], [0.0, float("nan")]])
def test_floating_point_pixels_of_another_range_are_refused(values: list[float]) -> None:
    image = Image.fromarray(np.array([values], np.float32))
    with pytest.raises(CorruptSample, match="floating-point pixels"):
        decode_image(encoded_as(image, "TIFF"))


def test_postscript_is_never_opened() -> None:
    """Pillow would pass the file to Ghostscript."""
    with pytest.raises(CorruptSample, match=r"a known format \(JPEG, .*; HEIC and SVG are not"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_bomb_gives_the_limit_of_this_package_alone(side: int) -> None:
    """Pillow warns of the first size, and refuses the second in other words."""
    program = (
        "import io\n"
        "from PIL import Image\n"
        "from blip_scale.data.pixels.decoding import decode_image\n"
        "file = io.BytesIO()\n"
        f"Image.new('1', ({side}, {side})).save(file, 'PNG')\n"
        "try:\n    decode_image(file.getvalue())\n"
        "except ValueError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "more than max_pixels (89478485)" in ended.stdout and not ended.stderr


@pytest.mark.parametrize("path", ["fast", "exact", "published"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_bomb_is_refused_by_its_header(path: str, kind: str) -> None:
    encoded = encoded_as(Image.new("RGB", (400, 300)), kind)
    transform = TrainTransform(16, path=path, max_pixels=400 * 300 - 1)  # type: ignore[arg-type]
    with pytest.raises(CorruptSample, match=r"400x300 pixels, more than max_pixels \(119999\)"):
        transform(encoded, np.random.default_rng(0))
    TrainTransform(16, path=path, max_pixels=400 * 300)(  # type: ignore[arg-type]
        encoded, np.random.default_rng(0)
    )
