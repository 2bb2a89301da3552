"""The page of tools/demo.py: a real server, asked through gradio's client and in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import tiny_runs
from PIL import Image

from blip_scale.commands import demo_page, predict
from blip_scale.commands.page_service import BEAM, NUCLEUS, WHOLE_CAPTION, Service
from blip_scale.data.shards import write_shards
from blip_scale.inference.loading import load_blip

_NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, _NAMES)), "")


@pytest.fixture(scope="module")
def page(ours: Path, hf: Path, pictures: Path) -> Iterator[str]:
    """Address of the page with a checkpoint of pretraining and one for questions."""
    options = demo_page.parser().parse_args([str(ours), str(hf / "vqa"), "--images", str(pictures)])
    blocks = demo_page.build(demo_page.service(options))
    demo_page.launch(blocks, options, prevent_thread_lock=True, quiet=True)
    yield blocks.local_url
    blocks.close()


@pytest.fixture(scope="module")
def client(page: str) -> Any:
    from gradio_client import Client

    return Client(page, verbose=False)


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], pictures: Path) -> Any:
    """What tools/predict.py says."""

    def run(use: str, *arguments: Any) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert predict.main([use, *map(str, arguments)]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.mark.multiprocess
def test_the_page_says_what_predict_says(
    client: Any, ask: Any, ours: Path, hf: Path, pictures: Path
) -> None:
    from gradio_client import handle_file

    path = next(pictures.glob("*.png"))
    image = handle_file(str(path))
    caption = client.predict(image, BEAM, 3, 0, api_name="/caption")
    assert caption == ask("caption", path, "--model", ours)[0]["caption"]
    sampled = [client.predict(image, NUCLEUS, 3, s, api_name="/caption") for s in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    question = "a red disc?"
    answer = client.predict(image, question, api_name="/answer")
    assert answer == ask("vqa", path, "--model", hf / "vqa", "--question", question)[0]["answer"]
    rows = client.predict(image, "a big disc\n\n a small cross", api_name="/match")["data"]
    texts = ["--text", "a big disc", "--text", "a small cross"]
    expected = ask("match", path, "--model", ours, *texts)
    expected.sort(key=lambda row: -row["itm"])
    assert [row[0] for row in rows] == [row["text"] for row in expected]
    for row, line in zip(rows, expected, strict=True):
        assert (float(row[1]), float(row[2])) == pytest.approx((line["itm"], line["itc"]), abs=1e-3)
    for rerank, more in ((False, []), (True, ["--rerank", "32"])):
        shown = client.predict("a big disc", rerank, api_name="/search")
        expected = ask("search", pictures, "--model", ours, *texts[:2], "--top", "12", *more)
        names = [entry["caption"].partition(" · ")[2] for entry in shown]
        assert names == [Path(row["image"]).stem for row in expected]
        assert all(Path(entry["image"]).is_file() for entry in shown)


@pytest.mark.multiprocess
def test_what_is_missing_is_said(client: Any, pictures: Path, tmp_path: Path) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    path = next(pictures.glob("*.png"))
    (tmp_path / "cut.png").write_bytes(path.read_bytes()[:-40])
    whole, broken = handle_file(str(path)), handle_file(str(tmp_path / "cut.png"))
    for inputs, name, message in (
        ((None, BEAM, 3, 0), "caption", "Drop an image first."),
        ((None, "a?"), "answer", "Drop an image first."),
        ((None, "a"), "match", "Drop an image first."),
        ((whole, " \n"), "match", "Type a text first."),
        ((whole, " "), "answer", "Type a question first."),
        ((" ", False), "search", "Type a text first."),
        ((broken, BEAM, 3, 0), "caption", "This image can't be used: "),
    ):
        with pytest.raises(AppError, match=message):
            client.predict(*inputs, api_name=f"/{name}")


def test_words_are_explained(ours: Path, hf: Path, pictures: Path, tmp_path: Path) -> None:
    """A heat map of each word, over pixels of the image; the checkpoint's own caption without a
    text; and a line where that cannot be."""
    path = str(next(pictures.glob("*.png")))
    service = Service([load_blip(ours)], [])
    maps = service.explain(path, "a big disc, and a cross")
    assert [word for word, _ in maps] == [WHOLE_CAPTION, "a", "big", "disc", "and", "a", "cross"]
    assert len({picture.tobytes() for _, picture in maps}) == len(maps)
    assert {picture.size for _, picture in maps} == {Image.open(path).size}
    caption = service.caption(path, BEAM, 3, 0)
    assert " ".join(word for word, _ in service.explain(path, " ")[1:]) == caption
    (tmp_path / "cut.png").write_bytes(Path(path).read_bytes()[:-40])
    judge = Service([load_blip(hf / "retrieval")], [])
    for checked, image, text, message in (
        (service, None, "a", "drop an image first"),
        (service, path, "?!", "holds no word"),
        (service, str(tmp_path / "cut.png"), "a", "can't be used"),
        (judge, path, "", "type a caption first"),
        (Service([load_blip(hf / "vqa")], []), path, "a", "none of the checkpoints can match"),
    ):
        with pytest.raises(ValueError, match=message):
            checked.explain(image, text)
    assert len(judge.explain(path, "a disc")) == 3


def test_images_of_shards_are_shown_with_their_captions(ours: Path, tmp_path: Path) -> None:
    """Examples and search take a set of shards as they take a folder; broken images are left."""
    pytest.importorskip("gradio")
    records = tiny_runs.records("p")
    records[0] = replace(records[0], image=records[0].image[:60])
    write_shards(tmp_path / "set", records, shard_size="4kb")
    options = demo_page.parser().parse_args([str(ours), "--images", str(tmp_path / "set")])
    (tmp_path / "unpacked").mkdir()
    service = demo_page.service(options, tmp_path / "unpacked")
    assert len(service.images) == len(records)
    assert all(Path(path).parent == tmp_path / "unpacked" for path in service.images)
    names = [name for _, name in service.thumbnails()]
    assert len(names) == 12 and set(names) <= {record.caption for record in records[1:]}
    assert len(service.examples()) == 6
    results = service.search("a big disc", rerank=False)
    assert {name.partition(" · ")[2] for _, name in results} <= {r.caption for r in records}


@pytest.fixture(scope="module")
def private(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image, a link to another one, and files that are nobody's business."""
    folder = tmp_path_factory.mktemp("private")
    first, second = sorted(pictures.glob("*.png"))[:2]
    shutil.copy(first, folder / "photo.png")
    (folder / "linked.png").symlink_to(second)
    for name in (".env", "notes.txt", ".hidden.png", "photo.json"):
        (folder / name).write_text("secret words")
    return folder


@pytest.fixture
def open_page(ours: Path, private: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a page over that folder, served as the command serves it.

    The variable and the working folder hold for one test: other pages have gradio's own.
    """
    options = demo_page.parser().parse_args([str(ours), "--images", str(private)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        blocks = demo_page.build(demo_page.service(options))
        demo_page.launch(blocks, options, prevent_thread_lock=True, quiet=True)
        yield blocks.local_url
        blocks.close()


@pytest.mark.multiprocess
def test_only_pixels_are_served(open_page: str, private: Path, pictures: Path) -> None:
    import httpx
    from gradio_client import Client

    asker = Client(open_page, verbose=False)
    shown = asker.predict("a big disc", False, api_name="/search")
    names = {entry["caption"].partition(" · ")[2] for entry in shown}
    assert names == {"photo", "linked"}, "a linked image is shown like any other"
    assert all(Path(entry["image"]).is_file() for entry in shown)
    linked = (private / "linked.png").resolve()
    for path in [*private.iterdir(), private, linked, Path("/etc/passwd")]:
        for place in (path, private / ".." / private.name / path.name):
            answer = httpx.get(f"{open_page}gradio_api/file={place}")
            assert answer.status_code in (403, 404), place
            assert "secret words" not in answer.text
    assert httpx.get(f"{open_page}gradio_api/file={private}/%2e%2e/x").status_code in (403, 404)


@pytest.mark.multiprocess
def test_uploads_have_a_limit(open_page: str, pictures: Path) -> None:
    import httpx

    small = next(pictures.glob("*.png")).read_bytes()
    for content, wanted in ((small, 200), (b"x" * (21 << 20), 413)):
        files = {"files": ("a.png", content, "image/png")}
        answer = httpx.post(f"{open_page}gradio_api/upload", files=files, timeout=60)
        assert answer.status_code == wanted


@pytest.mark.multiprocess
def test_only_uploads_are_looked_at(open_page: str, private: Path) -> None:
    """The path in a call is the caller's to choose."""
    import httpx

    for path in (private / "photo.png", private / ".env", "/etc/passwd", "http://127.0.0.1:9/a"):
        image = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        call = f"{open_page}gradio_api/call/caption"
        asked = httpx.post(call, json={"data": [image, BEAM, 3, 0]}, timeout=60)
        events = httpx.get(f"{call}/{asked.json()['event_id']}", timeout=60).text
        assert "event: error" in events and "event: complete" not in events, path


@pytest.mark.multiprocess
def test_this_machine_alone_is_served(open_page: str) -> None:
    import psutil

    port = int(open_page.rstrip("/").rpartition(":")[2])
    listening = [c for c in psutil.Process().net_connections() if c.status == "LISTEN"]
    assert {c.laddr.ip for c in listening if c.laddr.port == port} == {"127.0.0.1"}


def test_uploads_lie_in_a_folder_of_the_command(
    ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gradio's own folder is called the same for all users of a machine."""
    seen: list[tuple[str, int]] = []

    def launched(page: Any, options: Any) -> None:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        seen.append((str(folder), folder.stat().st_mode & 0o777))
        assert Path(page.GRADIO_CACHE).resolve() == folder.resolve()

    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    monkeypatch.setattr(demo_page, "launch", launched)
    assert demo_page.main([str(ours)]) == 0
    ((folder, mode),) = seen
    assert mode == 0o700 and not Path(folder).exists()


@pytest.mark.multiprocess
def test_the_page_names_no_other_host(page: str) -> None:
    """Scripts, styles and connections of gradio's page point to this server alone, and the policy
    forbids the browser everything else."""
    import httpx

    answer = httpx.get(page)
    tags = re.findall(r"<(?:script|link)[^>]*?(?:src|href)=\"([^\"]*)\"", answer.text)
    assert len(tags) >= 3
    assert {urlsplit(tag).netloc for tag in tags} <= {"", urlsplit(page).netloc}
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.headers["content-security-policy"].startswith("default-src 'self' data: blob:;")
    for place in ("http://127.0.0.1:9/a", "https://example.org/a.png"):
        answer = httpx.get(f"{page}gradio_api/file={place}")
        assert answer.status_code == 404 and "location" not in answer.headers, place


@pytest.mark.multiprocess
@pytest.mark.skipif(not BROWSER, reason="no chromium on this machine")
def test_a_person_uses_it(page: str, ask: Any, ours: Path, pictures: Path, tmp_path: Path) -> None:
    """Drops an image, clicks an example, reads captions, looks at words, asks, matches, searches;
    the browser asks no other host."""
    from playwright.sync_api import expect, sync_playwright

    path = next(pictures.glob("*.png"))
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        seen = browser.new_page(viewport={"width": 1280, "height": 1000})
        requests: list[str] = []
        refused: list[str] = []
        seen.on("request", lambda request: requests.append(request.url))
        seen.on("console", lambda message: refused.append(message.text))
        seen.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        seen.goto(page)
        examples = seen.locator("#examples button img")
        expect(examples).to_have_count(6)
        seen.wait_for_timeout(2000)  # the page listens to clicks some time after it is drawn
        caption = seen.get_by_label("Caption", exact=True)
        seen.locator("input[type=file]").first.set_input_files(str(path))
        expect(caption).to_have_value(ask("caption", path, "--model", ours)[0]["caption"])
        examples.nth(1).click()
        name = seen.locator("#examples .caption-label").nth(1).inner_text()
        (example,) = pictures.rglob(f"{name}.png")
        expect(caption).to_have_value(ask("caption", example, "--model", ours)[0]["caption"])
        seen.get_by_label("Where are the words?").fill("a big disc")
        seen.get_by_role("button", name="Show the words").click()
        heat = seen.locator("#heat img")
        expect(heat).to_be_visible()
        whole = heat.get_attribute("src")
        seen.locator("#words label", has_text="disc").click()
        expect(heat).not_to_have_attribute("src", str(whole))
        expect(seen.locator("#words label.selected")).to_have_text("disc")
        seen.get_by_label("Question").fill("a red disc?")
        seen.get_by_label("Question").press("Enter")
        expect(seen.get_by_label("Answer")).not_to_have_value("")
        seen.get_by_label("Texts, one a line").fill("a big disc\na small cross")
        seen.get_by_role("button", name="Match", exact=True).click()
        expect(seen.get_by_role("cell", name="a small cross").first).to_be_visible()
        seen.get_by_role("tab", name="Search").click()
        results = seen.locator("#results .grid-container img")
        expect(results).to_have_count(12)
        seen.get_by_role("button", name="Search", exact=True).click()
        expect(seen.get_by_text("Type a text first.")).to_be_visible()
        expect(results).to_have_count(12)
        seen.get_by_placeholder("Search 16 images").fill("a big disc")
        seen.get_by_role("button", name="Search", exact=True).click()
        expect(seen.locator("#results .caption-label").first).to_contain_text("cosine")
        seen.screenshot(path=str(tmp_path / "page.png"))
        browser.close()
    hosts = {urlsplit(url).netloc for url in requests if not url.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(page).netloc}
    assert not [text for text in refused if "Content Security Policy" in text]


def test_without_gradio(
    ours: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert demo_page.main([str(ours)]) == 2
    assert "pip install --no-deps -r requirements-web.txt" in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    assert demo_page.main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err
