"""CapFilt with a captioner behind HTTP, against a server on loopback that speaks its protocol."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from PIL import Image

from blip_scale.capfilt import endpoint as endpoints
from blip_scale.capfilt.endpoint import Endpoint, NoCaption, caption_of
from blip_scale.commands import capfilt
from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.reading.stream_store import StreamStore
from blip_scale.data.shards import Record, write_shards
from blip_scale.errors import RefusedInput
from blip_scale.storage.objects import RemoteError

Answer = Callable[["_Handler", str], None]


def caption_for(image: bytes) -> str:
    return f"A drawing, {hashlib.sha256(image).hexdigest()[:8]}. It has two sentences!"


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body, self.headers["Authorization"]))
        text, picture = body["messages"][0]["content"]
        assert (text["type"], picture["type"]) == ("text", "image_url")
        head, _, data = picture["image_url"]["url"].partition(";base64,")
        image = base64.b64decode(data)
        with Image.open(io.BytesIO(image)) as opened:
            assert head == f"data:{opened.get_format_mimetype()}"
        self.server.images.append(image)
        with self.server.lock:
            answers = self.server.answers
            answer = answers.pop(0) if answers else say
        answer(self, caption_for(image))

    def reply(self, content: bytes, status: int = 200, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on the terminal."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.answers: list[Answer] = []
        """How the next requests are answered; `say` once they are used up."""
        self.requests: list[tuple[str, dict[str, Any], str | None]] = []
        self.images: list[bytes] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing on the terminal where a client hangs up."""


def say(handler: _Handler, caption: str) -> None:
    message = {"role": "assistant", "content": caption}
    handler.reply(json.dumps({"choices": [{"index": 0, "message": message}]}).encode())


def saying(content: bytes, status: int = 200, length: int | None = None) -> Answer:
    return lambda handler, caption: handler.reply(content, status, length)


def hang_up(handler: _Handler, caption: str) -> None:
    handler.close_connection = True


def silence(handler: _Handler, caption: str) -> None:
    time.sleep(20)


def trickle(handler: _Handler, caption: str) -> None:
    handler.reply(b"", length=1000)
    for _ in range(200):
        handler.wfile.write(b"x")
        time.sleep(0.1)


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "_FIRST_PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def drawing() -> bytes:
    return next(iter(tiny_runs.records("web"))).image


def asked(server: _Server, image: bytes, **settings: Any) -> str:
    return caption_of(Endpoint(server.url, "m", **({"timeout_s": 1.0} | settings)), image, 7)


def test_a_request_has_prompt_image_and_key(
    server: _Server, drawing: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(endpoints.KEY_VARIABLE, "secret")
    assert asked(server, drawing, prompt="What?", max_tokens=9) == caption_for(drawing)
    path, body, key = server.requests[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("m", 9, 0, 7)
    assert body["messages"][0]["content"][0]["text"] == "What?"
    bitmap = io.BytesIO()
    Image.new("RGB", (4, 4)).save(bitmap, "BMP")
    asked(server, bitmap.getvalue())
    assert server.images[1][:2] == b"\xff\xd8", "servers need not read BMP"


@pytest.mark.parametrize(
    "answer",
    [
        saying(b"busy", 503), saying(b"", 429), hang_up, silence, trickle,
        saying(b"{", length=100), saying(b"x" * (2 << 20)),
    ],
    ids=["busy", "too_many", "hangs_up", "silent", "trickles", "cut", "huge"],
)  # fmt: skip
def test_what_may_pass_is_retried(server: _Server, drawing: bytes, answer: Answer) -> None:
    server.answers = [answer]
    assert asked(server, drawing) == caption_for(drawing)
    assert len(server.requests) == 2
    server.answers = [answer]
    begin = time.monotonic()
    with pytest.raises(RemoteError, match="finished work is kept"):
        asked(server, drawing, retry_s=0)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    "content",
    [
        b"<html>", b"", b"[]", b"null", b'{"choices": []}', b'{"choices": {"0": 1}}',
        b'{"choices": [{"message": {"content": ["text"]}}]}', b"[" * 100_000, b"\xff\xfe",
        b'{"choices": [{"message": {"content": " \\n "}}]}',
        b'{"choices": [{"message": {"content": "\\ud800"}}]}',
        b'{"choices": [{"message": {"content": null}}]}',
    ],
)  # fmt: skip
def test_garbage_is_no_caption(server: _Server, drawing: bytes, content: bytes) -> None:
    server.answers = [saying(content)] * 3
    with pytest.raises(NoCaption):
        asked(server, drawing)
    assert len(server.requests) == 3
    server.answers = [saying(content)]
    assert asked(server, drawing) == caption_for(drawing)


def test_refusals_cost_an_image_or_end_the_job(server: _Server, drawing: bytes) -> None:
    server.answers = [saying(b"image too small", 400), saying(b"no such model", 404)]
    with pytest.raises(NoCaption, match="status 400: 'image too small'"):
        asked(server, drawing)
    with pytest.raises(RefusedInput, match=r"refuses requests for m .*--captioner-model"):
        asked(server, drawing)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://x",
        "127.0.0.1:80",
        "http://user:key@x",
        "http:///v1",
        "http://x:port",
        "http://[x",
        "",
    ],
)
def test_odd_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="--captioner-url"):
        Endpoint(url, "m")


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 drawings in several shards, one of which can't be decoded."""
    folder = tmp_path_factory.mktemp("web") / "web"
    records = list(tiny_runs.records("web"))[:24]
    records[20] = Record("broken", records[20].image[:60], "a disc", "web")
    write_shards(folder, records, shard_size="4kb")
    return folder


def run(web: Path, out: Path, url: str, *more: str) -> int:
    return capfilt.main([
        str(web), str(out), "--captioner-url", url, "--captioner-model", "m", "--as", "overlay",
        "--role", "vlm", "--workers", "1", "--device", "cpu", "--batch-size", "4",
        "--captioner-requests", "2", *more,
    ])  # fmt: skip


def shards_of(folder: Path) -> dict[str, bytes]:
    names = [*sorted(folder.glob("*.mds")), folder / "index.json"]
    return {path.name: path.read_bytes() for path in names}


@pytest.fixture(scope="module")
def whole(web: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a job writes in one go."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with _Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        assert run(web, out, running.url) == 0
        running.shutdown()
    return shards_of(out)


def test_the_answers_become_an_overlay_with_provenance(
    web: Path, server: _Server, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    server.answers = [saying(b"too small", 400)]
    assert run(web, out, server.url) == 0
    recipe = StreamRecipe("web", str(web), overlays=[str(out)], captions={"vlm": 1.0})
    store = StreamStore(recipe)
    kinds: Counter[str] = Counter()
    refused = 0
    for place in store.places(range(24)):
        sample = store.read(*place)
        kinds.update(sample["roles"])
        texts = dict(zip(sample["roles"], sample["captions"], strict=True))
        if sample["id"] == "broken":
            assert set(texts) == {"caption"}
            continue
        assert texts["web"] == texts["caption"]
        refused += "vlm" not in texts
        assert texts.get("vlm", caption_for(sample["image"])) == caption_for(sample["image"])
    assert refused == 1 and kinds == {"caption": 24, "web": 23, "vlm": 22}
    manifest = json.loads((out / "overlay.json").read_text())
    captioner = manifest["made_by"]["captioner"]
    assert captioner["model"] == "m" and captioner["prompt"] == Endpoint.prompt
    assert captioner["url_host"] == server.url.split("/")[2] and manifest["time"]
    statistics = json.loads((out / "statistics.json").read_text())
    assert statistics["images_without_answer"] == 1
    assert not list(out.glob("answers-*")) and list(whole) == list(shards_of(out))


def test_a_killed_job_keeps_its_answers_and_gives_the_same_bytes(
    web: Path, server: _Server, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    job = multiprocessing.get_context("fork").Process(target=run, args=(web, out, server.url))
    server.answers = [say] * 11 + [silence] * 100
    job.start()
    give_up = time.monotonic() + 60
    while len(server.requests) < 13 and time.monotonic() < give_up:
        time.sleep(0.01)
    assert job.pid is not None
    os.kill(job.pid, signal.SIGKILL)
    job.join()
    before = len(server.requests)
    server.answers = []
    time.sleep(0.1)
    answers = b"".join(file.read_bytes() for file in out.rglob("answers-*/*.jsonl"))
    assert answers.count(b"\n") >= 9
    last = max(out.rglob("answers-*/*.jsonl"))
    last.write_bytes(last.read_bytes()[:-5] + b'\n{"id": 3}\n{"id": "cut')
    assert run(web, out, server.url) == 0
    assert len(server.requests) - before <= 23 - 8, "answers are not asked for again"
    assert shards_of(out) == whole


def test_an_overlay_never_replaces_another_set(
    web: Path, server: _Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "web"
    shutil.copytree(web, folder)
    before = shards_of(folder)
    assert run(folder, folder, server.url) == 2
    assert "holds another set (index.json): choose another OUT" in capsys.readouterr().err
    assert shards_of(folder) == before and not server.requests


def test_a_server_that_stays_away_fails_the_job_and_bad_settings_refuse_it(
    web: Path, server: _Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers = [say] * 5 + [hang_up] * 100
    assert run(web, tmp_path / "out", server.url, "--captioner-retry", "0") == 1
    assert "finished work is kept" in capsys.readouterr().err
    server.answers = [saying(b"", 401)] * 100
    assert run(web, tmp_path / "out", server.url) == 2
    assert endpoints.KEY_VARIABLE in capsys.readouterr().err
    server.answers = []
    assert run(web, tmp_path / "out", server.url, "--captioner-prompt", "other") == 2
    assert "was started with other input or options" in capsys.readouterr().err
    server.answers = [saying(b"", 302)] * 100
    assert run(web, tmp_path / "moved", server.url) == 2
    assert "refuses requests for" in capsys.readouterr().err
    server.answers = [saying(b"", 400)] * 100
    assert run(web, tmp_path / "none", server.url) == 2
    message = capsys.readouterr().err
    assert "no image got a caption (" in message and "status 400" in message
    for option, value in (("--batch-size", "0"), ("--workers", "-1"), ("--role", "a,b")):
        assert run(web, tmp_path / "other", server.url, option, value) == 2
        assert f"{option} " in capsys.readouterr().err
    assert run(web, tmp_path / "other", "") == 2
    assert "give --captioner and --filter, or --captioner-url" in capsys.readouterr().err
