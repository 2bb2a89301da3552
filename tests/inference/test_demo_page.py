"""The page of tools/demo.py: a real server, asked through gradio's client and in a real browser."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blip_scale.commands import demo_page, predict

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
    said = client.predict(image, demo_page.BEAM, 3, 0, api_name="/caption")
    assert said == ask("caption", path, "--model", ours)[0]["caption"]
    sampled = [
        client.predict(image, demo_page.NUCLEUS, 3, s, api_name="/caption") for s in (0, 0, 1)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    question = "a red disc?"
    said = client.predict(image, question, api_name="/answer")
    assert said == ask("vqa", path, "--model", hf / "vqa", "--question", question)[0]["answer"]
    rows = client.predict(image, "a big disc\n\n a small cross", api_name="/match")["data"]
    texts = ["--text", "a big disc", "--text", "a small cross"]
    found = sorted(ask("match", path, "--model", ours, *texts), key=lambda one: -one["itm"])
    assert [row[0] for row in rows] == [one["text"] for one in found]
    assert [float(row[1]) for row in rows] == pytest.approx([f["itm"] for f in found], abs=1e-3)
    assert [float(row[2]) for row in rows] == pytest.approx([f["itc"] for f in found], abs=1e-3)
    for rerank, more in ((False, []), (True, ["--rerank", "32"])):
        shown = client.predict("a big disc", rerank, api_name="/search")
        found = ask("search", pictures, "--model", ours, *texts[:2], "--top", "12", *more)
        names = [one["caption"].partition(" · ")[2] for one in shown]
        assert names == [Path(one["image"]).stem for one in found]
        assert all(Path(one["image"]).is_file() for one in shown)


@pytest.mark.multiprocess
def test_what_is_missing_is_said(client: Any, pictures: Path, tmp_path: Path) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    (tmp_path / "cut.png").write_bytes(next(pictures.glob("*.png")).read_bytes()[:-40])
    broken = handle_file(str(tmp_path / "cut.png"))
    for given, name, message in (
        ((None, demo_page.BEAM, 3, 0), "caption", "drop an image first"),
        ((None, "a?"), "answer", "drop an image first"),
        ((None, "a"), "match", "drop an image first"),
        ((None, " \n"), "match", "type a text first"),
        ((None, " "), "answer", "type a question first"),
        ((" ", False), "search", "type a text first"),
        ((broken, demo_page.BEAM, 3, 0), "caption", "can't be decoded"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict(*given, api_name=f"/{name}")


@pytest.mark.multiprocess
@pytest.mark.skipif(not BROWSER, reason="no chromium on this machine")
def test_a_person_uses_it(page: str, ask: Any, ours: Path, pictures: Path, tmp_path: Path) -> None:
    """Drops an image, reads its caption, asks, matches, searches."""
    from playwright.sync_api import expect, sync_playwright

    path = next(pictures.glob("*.png"))
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        seen = browser.new_page(viewport={"width": 1280, "height": 1000})
        seen.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        seen.goto(page)
        seen.locator("input[type=file]").first.set_input_files(str(path))
        caption = ask("caption", path, "--model", ours)[0]["caption"]
        expect(seen.get_by_label("Caption", exact=True)).to_have_value(caption)
        seen.get_by_label("Question").fill("a red disc?")
        seen.get_by_label("Question").press("Enter")
        expect(seen.get_by_label("Answer")).not_to_have_value("")
        seen.get_by_label("Texts, one a line").fill("a big disc\na small cross")
        seen.get_by_role("button", name="Match", exact=True).click()
        expect(seen.get_by_role("cell", name="a small cross").first).to_be_visible()
        seen.get_by_role("tab", name="Search").click()
        seen.get_by_placeholder("Search 16 images by text").fill("a big disc")
        seen.get_by_role("button", name="Search", exact=True).click()
        expect(seen.locator(".grid-container img")).to_have_count(12)
        seen.screenshot(path=str(tmp_path / "page.png"))
        browser.close()


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
