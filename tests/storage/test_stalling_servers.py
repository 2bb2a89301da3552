"""Servers that take a request and then say nothing, stop in the middle, or trickle."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.reading import slow_fetches
from blip_scale.data.reading.stream_store import StreamStore
from blip_scale.data.shards import Record, write_shards
from blip_scale.storage import objects
from blip_scale.storage.objects import ObjectFolder, RemoteError

LIMITS = r"limits are 1 s without a byte and 3 s a request"

IDLE_S, REQUEST_S = 1, 3
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nETag: \"a\"\r\n"
    b"Last-Modified: Mon, 05 Jan 2026 08:00:00 GMT\r\n\r\n"
)  # fmt: skip

Answer = Callable[[socket.socket], None]


def silence(client: socket.socket) -> None:
    client.recv(1)  # until it hangs up


def headers_alone(client: socket.socket) -> None:
    client.sendall(HEAD)
    client.recv(1)


def two_bytes_a_second(client: socket.socket) -> None:
    client.sendall(HEAD)
    for _ in range(500):
        client.sendall(b"xx")
        time.sleep(1)


def whole(client: socket.socket) -> None:
    client.sendall(HEAD + bytes(1000))


@pytest.fixture
def serve() -> Iterator[Callable[[list[Answer]], str]]:
    """Start TCP servers: the n-th GET gets the n-th answer, and all later ones the last.

    A server knows the size of everything. Calling the fixture with the answers gives its URL.
    """
    servers: list[socket.socket] = []

    def start(answers: list[Answer]) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)
        threading.Thread(target=accept, args=(server, answers), daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}/folder"

    def accept(server: socket.socket, answers: list[Answer]) -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:  # the test is over
                return
            threading.Thread(target=converse, args=(client, answers), daemon=True).start()

    def converse(client: socket.socket, answers: list[Answer]) -> None:
        try:
            while request := client.recv(1 << 16):
                if request.startswith(b"HEAD"):
                    client.sendall(HEAD)
                else:
                    (answers.pop(0) if len(answers) > 1 else answers[0])(client)
        except OSError:  # the client has given up
            pass
        finally:
            client.close()

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(objects, "IDLE_S", IDLE_S)
    monkeypatch.setattr(objects, "REQUEST_S", REQUEST_S)
    monkeypatch.setattr(objects, "FIRST_PAUSE_S", 0.1)
    objects._opened.cache_clear()
    yield
    objects._opened.cache_clear()


@pytest.mark.parametrize("answer", [silence, headers_alone, two_bytes_a_second])
def test_a_server_that_stalls_is_given_up(
    serve: Callable[[list[Answer]], str], tmp_path: Path, answer: Answer
) -> None:
    folder, began = ObjectFolder(serve([answer]), retry_s=2), time.monotonic()
    with pytest.raises(RemoteError, match=f"{folder.url}/a can't be read, tried .* {LIMITS}"):
        folder.get("a")
    with pytest.raises(RemoteError, match=f"{folder.url}/a can't be read, tried .* {LIMITS}"):
        folder.fetch("a", tmp_path / "a")
    assert time.monotonic() - began < 20
    assert not list(tmp_path.iterdir())


def test_a_server_that_stalls_once_is_asked_again(
    serve: Callable[[list[Answer]], str], tmp_path: Path
) -> None:
    folder = ObjectFolder(serve([headers_alone, two_bytes_a_second, whole]), retry_s=30)
    folder.fetch("a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == bytes(1000)


def test_a_shard_that_hangs_is_named_before_its_remote_is_given_up(
    serve: Callable[[list[Answer]], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(slow_fetches, "SLOW_S", 0.2)
    write_shards(tmp_path / "set", [Record("a", b"image", "a cat", "s", 64, 48)])
    index = (tmp_path / "set" / "index.json").read_bytes().ljust(1000)
    remote = serve([lambda client: client.sendall(HEAD + index), headers_alone])
    store = StreamStore(StreamRecipe("web", str(tmp_path / "cache"), remote), retry_s=0)
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match="can't be fetched"):
        store.read(0, 0)
    waited_s = time.monotonic() - began
    warnings = [text for text in caplog.messages if "no data for" in text]
    assert f"stream 'web': shard shard.00000.mds of {remote}: waiting for 0 s" in warnings[0]
    assert 2 <= len(warnings) <= waited_s / 0.2
    time.sleep(0.5)
    assert [text for text in caplog.messages if "no data for" in text] == warnings


USES: dict[str, Callable[[ObjectFolder], object]] = {
    "listed": lambda folder: folder.files(),
    "found": lambda folder: folder.size("a"),
    "read": lambda folder: folder.get_range("a", 0, 10),
    "written": lambda folder: folder.put("a", bytes(8 << 20)),
    "deleted": lambda folder: folder.delete(["a"]),
}


@pytest.mark.parametrize("verb", USES)
def test_every_request_to_a_bucket_has_limits(deaf_bucket: str, verb: str) -> None:
    began = time.monotonic()
    with pytest.raises(
        RemoteError, match=rf"s3://bucket/.* can't be {verb}, tried once .*{LIMITS}"
    ):
        USES[verb](ObjectFolder(deaf_bucket, retry_s=0))
    assert time.monotonic() - began < 15


@pytest.fixture
def deaf_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket whose server reads the head of a request, and then neither reads nor answers."""
    server = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:  # the test is over
                return
            threading.Thread(target=converse, args=(client,), daemon=True).start()

    def converse(client: socket.socket) -> None:
        with client:
            client.recv(1 << 12)
            time.sleep(20)

    threading.Thread(target=accept, daemon=True).start()
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    yield "s3://bucket/folder"
    server.close()
