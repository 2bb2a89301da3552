"""Inputs that are small on a disk and huge in memory."""

from __future__ import annotations

import gzip
import io
import json
import resource
import tarfile
from pathlib import Path

from PIL import Image

from blip_scale.commands import prepare_data
from blip_scale.data.conversion.pairs import LARGEST_FILE_BYTES
from blip_scale.data.shards import read_index

MIB = 1 << 20
GROWTH_KB = 200_000


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _huge(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Header and zeros of a member, compressed as a gzip member of its own."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as file:
        file.write(member.tobuf())
        for _ in range(size // MIB):
            file.write(bytes(MIB))
    return packed.getvalue()


def _pairs(*names: str, end: bool = False) -> bytes:
    """Pairs as a compressed part of a tar; `end` adds the end mark."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for name in names:
            _add(tar, f"{name}.png", _png())
            _add(tar, f"{name}.txt", f"a red square {name}".encode())
        length = tar.offset
    return gzip.compress(plain.getvalue() if end else plain.getvalue()[:length])


def _convert(source: Path, out: Path) -> tuple[set[str], list[tuple[str, str]], int]:
    """Ids written, ids and reasons of the rejects, and how much memory the process grew by, in
    kB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reader = "folder" if source.is_dir() else "webdataset"
    options = ["--workers", "1", "--tokenizer", "/nowhere"]
    assert prepare_data.main([reader, str(source), str(out), *options]) == 0
    ids = {shard.read(i)["id"] for shard in read_index(out) for i in range(shard.samples)}
    lines = (out / "rejects.jsonl").read_text().splitlines()
    rejects = [(line["id"], line["reason"]) for line in map(json.loads, lines)]
    return ids, rejects, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def test_a_member_larger_than_any_image_is_rejected_unread(tmp_path: Path) -> None:
    source = tmp_path / "set.tar.gz"
    bomb = _huge("b.png", LARGEST_FILE_BYTES + MIB)
    source.write_bytes(_pairs("a") + bomb + _pairs("c", end=True))
    assert source.stat().st_size < 4 * MIB
    ids, rejects, growth_kb = _convert(source, tmp_path / "out")
    assert ids == {"set/a", "set/c"} and rejects == [("set/b", "file too large")]
    assert growth_kb < GROWTH_KB


def test_a_header_of_gigabytes_ends_the_tar_as_damage_does(tmp_path: Path) -> None:
    source = tmp_path / "set.tar.gz"
    bomb = _huge("PaxHeader", LARGEST_FILE_BYTES + MIB, tarfile.XHDTYPE)
    source.write_bytes(_pairs("a", "b") + bomb + _pairs("c", end=True))
    ids, rejects, growth_kb = _convert(source, tmp_path / "out")
    assert "set/a" in ids and ("set.tar.gz", "damaged input") in rejects
    assert growth_kb < GROWTH_KB


def test_a_sparse_file_among_the_images(tmp_path: Path) -> None:
    source = tmp_path / "set"
    source.mkdir()
    for name in ("a", "b", "c"):
        (source / f"{name}.png").write_bytes(_png())
        (source / f"{name}.txt").write_text("a red square")
    for name in ("b.png", "c.txt"):
        with (source / name).open("r+b") as file:
            file.truncate(LARGEST_FILE_BYTES + 1)
    ids, rejects, growth_kb = _convert(source, tmp_path / "out")
    assert ids == {"a.png"}
    assert sorted(rejects) == [("b.png", "file too large"), ("c.png", "file too large")]
    assert growth_kb < GROWTH_KB
