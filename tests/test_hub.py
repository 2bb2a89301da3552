"""An unreachable hub is announced at once and refused within seconds. Uses loopback only."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest
from huggingface_hub import constants

from blip_scale.config.model_recipe import TextRecipe
from blip_scale.config.recipe import Recipe
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.inference.sizes import med_config
from blip_scale.interop import bert, vision
from blip_scale.storage import hub, objects

REPO = Path(__file__).resolve().parent.parent
CLOSED = "http://127.0.0.1:9"


@pytest.fixture
def silent() -> Iterator[str]:
    """Address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def use_tokenizer() -> None:
    load_tokenizer(TextRecipe(checkpoint=None, tokenizer="nobody/has-this"))


def use_sizes() -> None:
    recipe = Recipe()
    text = replace(recipe.model.text, checkpoint="nobody/has-this")
    med_config(replace(recipe, model=replace(recipe.model, text=text)), None)  # type: ignore[arg-type]


def use_text_weights() -> None:
    bert._read("nobody/has-this")


def use_vision_weights() -> None:
    vision._timm_weights("vit_base_patch16_224")


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("use", "setting", "instead"),
    [
        (use_tokenizer, "model.text.tokenizer", "FOLDER"),
        (use_sizes, "model.text.checkpoint", "FOLDER"),
        (use_text_weights, "model.text.checkpoint", "FOLDER"),
        (use_vision_weights, "model.vision.checkpoint", "FILE"),
    ],
)
@pytest.mark.parametrize("answer", ["refused", "timed out"])
def test_a_hub_that_does_not_answer_is_refused(
    use: Callable[[], None],
    setting: str,
    instead: str,
    answer: str,
    silent: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    endpoint = CLOSED if answer == "refused" else silent
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hub, "TIMEOUT_S", 1.0)
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"{setting}: .* does not answer .*{answer}") as refused:
        use()
    assert time.monotonic() - began < 10
    assert str(refused.value).endswith(f"set {setting}={instead}")
    assert caplog.messages[0].startswith(f"{setting}: fetching ")
    assert caplog.messages[0].endswith(f" from {endpoint}")


@pytest.mark.usefixtures("online")
def test_any_answer_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class NotFound(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert not hub.is_local("nobody/has-this", ("config.json",), "a")
        server.shutdown()


@pytest.fixture
def trickling() -> Iterator[str]:
    """Address of a hub with one repository, whose files arrive at two bytes a second."""

    class Trickling(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            if self.path != "/" and not self.path.startswith("/some/bert/"):
                self.send_error(404)  # a question of huggingface_hub's about its surroundings
                return
            self.send_response(200)
            for name, value in (("ETag", '"a"'), ("X-Repo-Commit", "1" * 40)):
                self.send_header(name, value)
            self.send_header("Content-Length", "1000")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            with contextlib.suppress(OSError):  # the client is ended
                while self.path.startswith("/some/bert/"):
                    self.wfile.write(b"xx")
                    time.sleep(1)

        def log_message(self, format: str, *arguments: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Trickling) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.usefixtures("online")
def test_a_download_that_trickles_is_given_up(
    trickling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The location and the limit are named, and no process is left."""
    monkeypatch.setattr(constants, "ENDPOINT", trickling)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "WINDOW_S", 12.0)
    monkeypatch.setattr(objects, "RETRY_S", 0.0)
    began = time.monotonic()
    message = (
        f"{trickling}/some/bert can't be fetched, tried once .*fewer than 1000 bytes/s for 12 s"
    )
    with pytest.raises(objects.RemoteError, match=message):
        hub.is_local("some/bert", ("config.json",), "model.text.checkpoint")
    assert time.monotonic() - began < 25
    unfinished = list((tmp_path / "models--some--bert" / "blobs").glob("*.incomplete"))
    assert unfinished, "the trickle was not reached"
    children = psutil.Process().children()
    assert not [child for child in children if "hf_hub_download" in " ".join(child.cmdline())]


@pytest.mark.usefixtures("online")
def test_folders_and_what_is_cached_ask_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", CLOSED)
    assert hub.is_local(str(tmp_path), ("config.json",), "a")
    snapshot = tmp_path / "models--some--bert" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("1234")
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub.is_local("some/bert", ("config.json",), "a")
    assert caplog.messages == []


def test_a_command_says_it_and_goes_on_in_seconds(silent: str, tmp_path: Path) -> None:
    """Run a whole command in a process whose environment names the hub."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "captions.csv").write_text("image,caption\na.jpg,a dog\n")
    command = [sys.executable, "tools/prepare_data.py", "folder", str(tmp_path / "in")]
    environment = {"HF_ENDPOINT": silent, "HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1"}
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--dry-run", "--tokenizer", "nobody/has-this"],
        env=os.environ | environment | {"HF_HOME": str(tmp_path / "cache")},
        cwd=REPO, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr  # a.jpg is missing
    assert time.monotonic() - began < 60
    messages = done.stderr.splitlines()
    assert messages[0] == f"model.text.tokenizer: fetching nobody/has-this from {silent}"
    assert messages[1].startswith("token counts are left out: ") and "timed out" in messages[1]
