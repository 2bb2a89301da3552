"""Images and captions in the forms of published sets, with odd ones, and their files."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from data_samples import jpeg
from PIL import Image

from blip_scale.data.conversion.pairs import Chunk, Found, RawPair, Reject

HTML = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>"
EMOJI_CAPTION = "a cat 😺 with a 👩‍👩‍👧 family"
RIGHT_TO_LEFT_CAPTION = "كلب يركض على الشاطئ"


def photo(number: int = 0, size: tuple[int, int] = (80, 60)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def turned(orientation: int) -> bytes:
    """A JPEG with 80x60 stored pixels and an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photo(), exif=exif.tobytes(), quality=95)


def png_header(width: int, height: int) -> bytes:
    """A tiny file whose header claims a huge picture."""
    whole = bytearray(encoded(Image.new("RGB", (1, 1)), "PNG"))
    whole[16:24] = struct.pack(">II", width, height)
    whole[29:33] = struct.pack(">I", zlib.crc32(whole[12:29]))
    return bytes(whole)


GOOD_IMAGES: dict[str, bytes] = {
    "jpeg": encoded(photo()),
    "progressive": encoded(photo(), progressive=True),
    "grey": encoded(photo().convert("L")),
    "cmyk": encoded(photo().convert("CMYK")),
    "palette": encoded(photo().quantize(16), "PNG"),
    "palette with a transparent colour": encoded(photo().quantize(16), "PNG", transparency=3),
    "alpha": encoded(photo().convert("RGBA"), "PNG"),
    "grey with alpha": encoded(photo().convert("LA"), "PNG"),
    "one bit": encoded(photo().convert("1"), "PNG"),
    "sixteen bits": encoded(Image.fromarray(np.full((60, 80), 40000, np.uint16)), "PNG"),
    "gif": encoded(photo(), "GIF"),
    "webp": encoded(photo(), "WEBP"),
    "bmp": encoded(photo(), "BMP"),
    "tiff": encoded(photo(), "TIFF"),
}
"""Images of 80x60 that are decoded and kept byte by byte."""

BAD_IMAGES: dict[str, tuple[bytes, str]] = {
    "truncated jpeg": (encoded(photo())[:-300], "undecodable"),
    "truncated png": (encoded(photo(), "PNG")[:-40], "undecodable"),
    "zero bytes": (b"", "undecodable"),
    "html": (HTML, "undecodable"),
    "one pixel": (encoded(Image.new("RGB", (1, 1)), "PNG"), "too small"),
    "twenty thousand wide": (encoded(Image.new("RGB", (20_000, 40)), "PNG"), "extreme aspect"),
    "a bomb": (png_header(20_000, 20_000), "too many pixels"),
    "a small bomb": (png_header(10_000, 10_000), "too many pixels"),
}


def members(*samples: tuple[str, Mapping[str, bytes]]) -> list[tuple[str, bytes]]:
    return [(f"{key}.{ending}", data) for key, parts in samples for ending, data in parts.items()]


def write_tar(path: Path, files: list[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def img2dataset_meta(key: str, caption: str | None, **more: Any) -> dict[str, Any]:
    """Columns that img2dataset writes for LAION-400M's list."""
    return {
        "url": f"https://host.example/{key}.jpg", "caption": caption, "NSFW": "UNLIKELY",
        "similarity": 0.3125, "LICENSE": "?", "key": key, "status": "success",
        "error_message": None, "width": 80, "height": 60, "original_width": 800,
        "original_height": 600, "exif": "{}", "sha256": "0" * 64, **more,
    }  # fmt: skip


def img2dataset_samples(
    shard: int, count: int
) -> list[tuple[str, dict[str, bytes], dict[str, Any]]]:
    """Tuples (key, files by ending, metadata) of a shard of img2dataset."""
    samples = []
    for i in range(count):
        key = f"{shard:05}{i:04}"
        caption = f"Picture {key}, {EMOJI_CAPTION}"
        meta = img2dataset_meta(key, caption)
        files = {
            "jpg": jpeg(shard * 1000 + i, (80, 60)),
            "txt": caption.encode(),
            "json": json.dumps(meta, indent=4).encode(),
        }
        samples.append((key, files, meta))
    return samples


def write_img2dataset_parquet(
    path: Path, samples: list[tuple[str, dict[str, bytes], dict[str, Any]]], images: bool = True
) -> None:
    """Write img2dataset's form `parquet`, or without images the parquet files beside its tars."""
    rows = []
    for _, files, meta in samples:
        row = dict(meta)
        if images:
            row |= {"jpg": files.get("jpg"), "txt": files["txt"].decode() if files else None}
        rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)


def write_img2dataset_tars(folder: Path, shards: int, count: int) -> None:
    """Write tars with the parquet files and statistics that img2dataset adds to them."""
    for shard in range(shards):
        samples = img2dataset_samples(shard, count)
        name = f"{shard:05}"
        write_tar(folder / f"{name}.tar", members(*((key, files) for key, files, _ in samples)))
        write_img2dataset_parquet(folder / f"{name}.parquet", samples, images=False)
        (folder / f"{name}_stats.json").write_text(json.dumps({"count": count}))


def read_all(chunks: list[Chunk]) -> list[Found]:
    return [item for chunk in chunks for item in chunk.read()]


def pairs(items: list[Found]) -> dict[str, RawPair]:
    return {item.id: item for item in items if isinstance(item, RawPair)}


def rejects(items: list[Found]) -> list[tuple[str, str]]:
    return [(item.id, str(item.reason)) for item in items if isinstance(item, Reject)]
