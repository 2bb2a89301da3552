"""Paths and web addresses are read alike; faults of web servers."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from blip_scale.data.conversion.pairs import RawPair, Reason
from blip_scale.data.conversion.screening import Rules, screen
from blip_scale.storage import objects
from blip_scale.storage.locations import (
    file_size,
    is_folder,
    list_folder,
    open_file,
    read_file,
)
from blip_scale.storage.objects import MissingFile, ObjectFolder, RefusedError, RemoteError, retried

BIG = os.urandom(objects.CHUNK_BYTES + 1000)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with links between folders, a cycle, a broken link, and odd names."""
    for name in ("a.txt", "b/c.txt", "b/d/e.txt", "b/ü #?%20.txt", ".hidden"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "f.txt").write_text("f")
    (tmp_path / "tree" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree" / "b" / "circle").symlink_to(tmp_path / "tree")
    (tmp_path / "tree" / "broken").symlink_to(tmp_path / "nowhere")
    return tmp_path / "tree"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_local_folder_is_listed(tree: Path, scheme: str) -> None:
    location = f"{scheme}{tree}"
    shallow = list_folder(location)
    assert [(entry.name, entry.is_folder, entry.size) for entry in shallow] == [
        (".hidden", False, 7), ("a.txt", False, 5), ("b", True, 0), ("broken", False, 0),
        ("linked", True, 0),
    ]  # fmt: skip
    deep = list_folder(f"{location}/", deep=True)
    assert [entry.name for entry in deep] == [
        ".hidden", "a.txt", "b/c.txt", "b/d/e.txt", "b/ü #?%20.txt", "broken", "linked/f.txt",
    ]  # fmt: skip
    for entry in deep:
        if entry.name != "broken":
            assert read_file(entry.location) == (tree / entry.name).read_bytes()
            assert file_size(entry.location) == entry.size
    with pytest.raises(FileNotFoundError, match="nothing: there is no such file or folder"):
        is_folder(f"{location}/nothing")
    with pytest.raises(NotADirectoryError, match=r"a\.txt is not a folder"):
        list_folder(f"{location}/a.txt")


def test_gzip_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[1]"))
    with open_file(str(tmp_path / "a.json.gz")) as file:
        assert file.read() == b"[1]"


class _Server(BaseHTTPRequestHandler):
    """Serves files by path and query; `plain` supports no ranges, `nohead` no sizes."""

    protocol_version = "HTTP/1.1"
    files = {  # noqa: RUF012
        "/a b%/c.txt": b"hello", "/x.txt?key=1%2F2": b"signed", "/t.json.gz": gzip.compress(b"[2]"),
        "/big": BIG, "/plain": b"no ranges", "/nohead": b"no sizes", "/empty": b"",
        "/odd%23": b"odd",
    }  # fmt: skip

    ranges = 0
    """Requests for a part of a file."""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        name = urllib.parse.unquote(path) + (f"?{query}" if query else "")
        if "forbidden" in name or (name == "/nohead" and self.command == "HEAD"):
            return self._answer(403, b"")
        if "broken" in name:
            return self._answer(503, b"")
        content = self.files.get(name)
        if content is None:
            return self._answer(404, b"")
        span = self.headers.get("Range", "").removeprefix("bytes=")
        if not span or name == "/plain":
            return self._answer(200, content)
        first, last = (int(number) for number in span.split("-"))
        type(self).ranges += 1
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        return self._finish(content[first : last + 1])

    do_HEAD = do_GET

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self._finish(content)

    def _finish(self, content: bytes) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_web_addresses_are_read_as_they_stand(web: str) -> None:
    assert read_file(f"{web}/a%20b%25/c.txt") == b"hello"
    assert read_file(f"{web}/x.txt?key=1%2F2") == b"signed"
    assert read_file(f"{web}/odd%2523") == b"odd"
    assert read_file(f"{web}/empty") == b""
    assert file_size(f"{web}/big") == len(BIG)
    assert not is_folder(f"{web}/big")
    for name in ("plain", "nohead"):
        with open_file(f"{web}/{name}") as file:
            assert file.read() == _Server.files[f"/{name}"]
    with open_file(f"{web}/t.json.gz") as file:
        assert file.read() == b"[2]"


def test_a_big_file_of_the_web_is_read_in_pieces(web: str, tmp_path: Path) -> None:
    _Server.ranges = 0
    with open_file(f"{web}/big") as file:
        assert file.seek(-5, io.SEEK_END) == len(BIG) - 5
        assert file.read() == BIG[-5:]
        file.seek(7)
        assert file.read(3) == BIG[7:10]
        assert file.read() == BIG[10:]
    assert _Server.ranges <= 5
    ObjectFolder(web, retry_s=0.0).fetch("big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == BIG
    assert [path.name for path in tmp_path.iterdir()] == ["big"]


def test_what_the_web_refuses_is_named_at_once(web: str) -> None:
    start_s = time.monotonic()
    with pytest.raises(MissingFile, match=rf"{web}/none can't be read, tried once \(.*404"):
        read_file(f"{web}/none")
    with pytest.raises(RefusedError, match=rf"{web}/forbidden can't be read, tried once \(.*403"):
        read_file(f"{web}/forbidden")
    with pytest.raises(RemoteError, match=rf"{web}/broken can't be read, tried once \(.*503") as e:
        read_file(f"{web}/broken")
    assert not isinstance(e.value, FileNotFoundError)
    with pytest.raises(ValueError, match=r"^ftp://host/a can't be opened: expected .*s3://"):
        read_file("ftp://host/a")
    assert time.monotonic() - start_s < 5
    restored = pickle.loads(pickle.dumps(e.value))
    assert (type(restored), str(restored)) == (RemoteError, str(e.value))  # from a worker


@pytest.mark.parametrize("name", ["none", "forbidden", "broken"])
def test_an_image_that_the_web_does_not_give_is_a_reject(web: str, name: str) -> None:
    record, rejects, _ = screen(RawPair("1", f"{web}/{name}", "a caption"), Rules("test"))
    assert record is None and [reject.reason for reject in rejects] == [Reason.MISSING_IMAGE]


def test_a_server_that_never_answers_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "IDLE_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start_s = time.monotonic()
        with pytest.raises(RemoteError, match="can't be read, tried once"):
            ObjectFolder(url, retry_s=0.0).get("a")
    assert 0.5 < time.monotonic() - start_s < 10


def test_the_pauses_double_and_the_patience_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, pauses = [0.0], []

    def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        now[0] += pause_s

    monkeypatch.setattr(objects.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(objects.time, "sleep", sleep)

    def failing() -> None:
        raise ConnectionError("reset by peer\nand more")

    with pytest.raises(RemoteError, match=r"s3://b/a can't be fetched, tried (\d+) times") as e:
        retried(failing, "fetched", "s3://b/a", retry_s=200)
    longest = [min(2.0**number, objects.LONGEST_PAUSE_S) for number in range(len(pauses))]
    for pause_s, most_s in zip(pauses, longest, strict=True):
        assert most_s / 2 <= pause_s <= most_s
    assert 200 - objects.LONGEST_PAUSE_S <= sum(pauses) <= 200
    assert len(caplog.records) == len(pauses) and str(len(pauses) + 1) in str(e.value)
    assert "\n" not in str(e.value) and "ConnectionError: reset by peer" in str(e.value)
    pauses.clear()
    with pytest.raises(RemoteError, match="tried once"):
        retried(failing, "fetched", "s3://b/a", retry_s=0)
    assert not pauses


def test_a_full_disk_is_not_waited_for() -> None:
    tries = []

    def full() -> None:
        tries.append(1)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        retried(full, "fetched", "s3://b/a", retry_s=60)
    assert len(tries) == 1


@pytest.mark.parametrize(
    ("url", "advice"),
    [("az://container/a", "AZURE_STORAGE_ACCOUNT_NAME"), ("s3://bucket/a", "AWS_ACCESS_KEY_ID")],
)
def test_without_credentials_the_error_says_what_to_set(
    url: str, advice: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """boto3 is installed, and finds no credentials."""
    pytest.importorskip("boto3")
    for name in list(os.environ):
        if name.startswith(("AWS_", "S3_", "AZURE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=rf"can't be opened .*set {advice}") as caught:
        ObjectFolder(url)
    assert "\n" not in str(caught.value)
