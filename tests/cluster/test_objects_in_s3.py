"""Objects in a real S3 server: names, listings, large objects through faults, credentials."""

from __future__ import annotations

import gzip
import io
import os
import sys
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_proxy import faulty_proxy
from s3_server import ACCESS_KEY, SECRET_KEY, S3Server

from blip_scale.data.conversion.listing import Listing
from blip_scale.data.conversion.pairs import Found, Source
from blip_scale.data.sources.parquet import read_parquet
from blip_scale.data.sources.webdataset import read_tar
from blip_scale.storage import objects
from blip_scale.storage.locations import is_folder, list_folder, open_file, read_file
from blip_scale.storage.objects import MissingFile, ObjectFolder, RefusedError, RemoteError

pytestmark = pytest.mark.s3


def read_rows(location: str) -> Iterator[Found]:
    """Content of a parquet file."""
    return read_parquet(Source(location), location, "a")


ODD = ("a#b/1", "a?b/1", "a%20b/1", "a b/1", "ü/1", "[x]*/1")


@pytest.fixture
def url(s3: S3Server) -> str:
    """A folder of the bucket for this test alone."""
    return f"s3://{s3.bucket}/{uuid.uuid4().hex[:8]}"


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """Content of a file of several parts, of which the last is short."""
    (tmp_path / "big").write_bytes(os.urandom(5 * objects.CHUNK_BYTES + 12345))
    return tmp_path / "big"


def test_names_are_taken_literally(s3: S3Server, url: str) -> None:
    for name in ODD:
        ObjectFolder(f"{url}/{name.partition('/')[0]}", 0.0).put("1", name.encode())
    for name in ODD:
        assert s3.get(f"{url}/{name}") == name.encode() == read_file(f"{url}/{name}")
    assert ObjectFolder(url, 0.0).sizes() == {name: len(name.encode()) for name in ODD}
    assert {entry.name for entry in list_folder(url)} == {name[:-2] for name in ODD}
    with pytest.raises(MissingFile, match=f"{url}/a//b can't be read"):
        read_file(f"{url}/a//b")


def test_a_bucket_is_listed_like_a_folder(s3: S3Server, url: str) -> None:
    """Empty objects that a console creates for folders are not listed."""
    for name in ("", "in/", "a.txt", "in/b.txt", "in/very/deep/c.txt", "index", "empty"):
        s3.put(f"{url}/{name}", b"" if name.endswith("/") or name in ("", "empty") else b"123")
    assert [(e.name, e.is_folder, e.size) for e in list_folder(f"{url}/")] == [
        ("a.txt", False, 3), ("empty", False, 0), ("in", True, 0), ("index", False, 3),
    ]  # fmt: skip
    deep = list_folder(url, deep=True)
    assert list(Listing.of(url)) == deep
    assert [e.name for e in deep] == ["a.txt", "empty", "in/b.txt", "in/very/deep/c.txt", "index"]
    assert [read_file(entry.location) for entry in deep] == [b"123", b"", *[b"123"] * 3]
    assert is_folder(f"{url}/in") and not is_folder(f"{url}/index")
    with pytest.raises(FileNotFoundError, match=f"{url}/ind: there is no such file or folder"):
        is_folder(f"{url}/ind")
    with pytest.raises(NotADirectoryError):
        list_folder(f"{url}/index")
    assert ObjectFolder(url).entries("nothing") == ({}, [])


def test_a_large_object_goes_through_faults_both_ways(
    s3: S3Server, url: str, big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "FIRST_PAUSE_S", 0.05)
    with faulty_proxy(s3.port, monkeypatch, share=0.2, seed=3) as proxy:
        folder = ObjectFolder(url, retry_s=60)
        folder.put("big", big)
        folder.fetch("big", tmp_path / "back")
        assert sum(proxy.faults.values()) >= 3, proxy.faults
    assert s3.get(f"{url}/big") == big.read_bytes() == (tmp_path / "back").read_bytes()
    tag = s3.client().head_object(Bucket=s3.bucket, Key=s3._key(f"{url}/big"))["ETag"]
    assert tag.strip('"').endswith("-6"), "in six parts"


def test_an_upload_that_fails_leaves_no_object(
    s3: S3Server, url: str, big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put(f"{url}/big", b"old")
    with faulty_proxy(s3.port, monkeypatch, share=0.0) as proxy:
        draw = proxy.draw
        proxy.draw = lambda command, path: (  # type: ignore[method-assign]
            "refused" if "partNumber=3" in path else draw(command, path)
        )
        for name in ("big", "new"):
            with pytest.raises(RemoteError, match=f"{url}/{name} can't be written, tried once"):
                ObjectFolder(url, retry_s=0.0).put(name, big)
        assert proxy.requests > 4
    assert s3.get(f"{url}/big") == b"old"
    assert s3.names(f"{url}/") == {"big"}


def test_removing_what_is_not_there_is_no_error(s3: S3Server, url: str) -> None:
    folder = ObjectFolder(url, 0.0)
    for name in "abc":
        folder.put(name, b"1")
    folder.delete(["a", "nothing", "c"])
    folder.delete([])
    assert s3.names(f"{url}/") == {"b"}


def test_tar_gzip_and_parquet_are_read_through_ranges(
    s3: S3Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Downloads survive faults, and damage in the file itself is told from network errors."""
    import pyarrow
    from pyarrow.parquet import write_table

    monkeypatch.setattr(objects, "FIRST_PAUSE_S", 0.05)
    content = os.urandom(9 << 20)
    tar_bytes, parquet_bytes = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w") as tar:
        for name, data in (
            ("1.jpg", content),
            ("1.txt", b"one"),
            ("2.jpg", b"2"),
            ("2.txt", b"two"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    write_table(pyarrow.table({"jpg": [content, b"2"], "caption": ["one", "two"]}), parquet_bytes)
    s3.put(f"{url}/a.tar", tar_bytes.getvalue())
    s3.put(f"{url}/a.parquet", parquet_bytes.getvalue())
    s3.put(f"{url}/a.tar.gz", gzip.compress(tar_bytes.getvalue()))
    with faulty_proxy(s3.port, monkeypatch, share=0.2, seed=5) as proxy:
        for name, read in (
            ("a.tar", read_tar),
            ("a.tar.gz", read_tar),
            ("a.parquet", read_rows),
        ):
            pairs = list(read(f"{url}/{name}"))
            assert [(pair.image, pair.captions) for pair in pairs] == [
                (content, "one"),
                (b"2", "two"),
            ]
        assert sum(proxy.faults.values())
        monkeypatch.setattr("blip_scale.storage.locations.RETRY_S", 0.0)
        from blip_scale.storage import locations

        locations._opened.cache_clear()
        monkeypatch.setattr(proxy, "share", 0.0)
        with open_file(f"{url}/a.parquet") as file:
            proxy.share = 1.0
            with pytest.raises(RemoteError, match=r"a\.parquet can't be read, tried once"):
                file.read()
        draw, seen = proxy.draw, []
        proxy.share = 0.0
        proxy.draw = lambda command, path: (  # type: ignore[method-assign]
            seen.append(path) or ("refused" if command == "GET" else draw(command, path))
        )
        for name, read in (("a.tar", read_tar), ("a.parquet", read_rows)):
            with pytest.raises(RemoteError, match=f"{name} can't be read, tried once"):
                list(read(f"{url}/{name}"))
        locations._opened.cache_clear()


def test_keys_in_the_environment_need_no_boto3(
    s3: S3Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] in ("boto3", "botocore")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "obstore.auth.boto3", raising=False)
    monkeypatch.setitem(sys.modules, "boto3", None)
    objects._opened.cache_clear()
    ObjectFolder(url, 0.0).put("a", b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(RefusedError, match=r"a can't be read.*Signature.*set AWS_ACCESS_KEY_ID"):
        ObjectFolder(url, 60).get("a")
    monkeypatch.undo()
    objects._opened.cache_clear()


def test_a_profile_is_read_with_boto3(
    s3: S3Server, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    keys = f"aws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    (tmp_path / "credentials").write_text(f"[mine]\n{keys}")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    ObjectFolder(url, 0.0).put("a", b"1")
    assert s3.get(f"{url}/a") == b"1"
