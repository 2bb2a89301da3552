"""The fast decoder and Pillow give the same pixels and refuse the same files."""

from __future__ import annotations

import io

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
        images = [
            TrainTransform(16, path=path)(encoded, np.random.default_rng(0))
            for path in ("fast", "published")
        ]
        assert np.abs(images[0].int() - images[1].int()).max() <= 2


def test_damaged_jpegs_fare_alike_in_both_decoders() -> None:
    """Cut off, with a flipped bit or a run of zeros: corrupt for both, or the same pixels."""
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
        ours, theirs = fast(bytes(damaged)), slow(bytes(damaged))
        kinds.add(type(ours))
        assert type(ours) is type(theirs)
        assert ours == theirs if isinstance(ours, str) else np.array_equal(ours, theirs)
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
    with pytest.raises(CorruptSample, match="DecompressionBomb"):
        TrainTransform(16)(encoded, np.random.default_rng(0))
    assert Image.open(io.BytesIO(saved(photo(60, 60), "JPEG"))).size == (60, 60)
