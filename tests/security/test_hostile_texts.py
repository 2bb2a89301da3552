"""Strings from outside in logs, on terminals and on pages; YAML and JSON that exhaust memory."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from blip_scale import logs
from blip_scale.commands import show_summary
from blip_scale.commands.command_line import refuse
from blip_scale.config import settings
from blip_scale.config.recipe import Recipe
from blip_scale.engine.watching.loggers.logger import LoggedRun
from blip_scale.engine.watching.monitor import Monitor, Panel
from blip_scale.engine.watching.run_manifest import RunManifest
from blip_scale.storage import run_folder

ours = logging.getLogger("blip_scale.somewhere")
FORGED = "id\n2026-11-30 04:00:00,000 ERROR blip_scale.engine [1]: the run is lost"
SEQUENCES = "\x1b]0;title\x07 \x1b[2J \x9b31m \u202egnp.exe \u2028 \x08\x08 \ud83d"


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    """Open the log of rank 0, and remove its handlers afterwards."""
    root, before = logging.getLogger(), list(logging.getLogger().handlers)
    level = root.level
    yield logs.set_up(tmp_path, 0)
    for handler in [added for added in root.handlers if added not in before]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    logging.captureWarnings(False)


def fail(message: str) -> None:
    raise ValueError(message)


def test_ids_forge_no_lines(log_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours.warning("sample %s is damaged", FORGED)
    ours.warning("sample %s is damaged", ValueError(FORGED))
    ours.warning(f"sample {FORGED} is damaged")
    logging.getLogger("some_library").error("sample %s", FORGED)
    try:
        fail(FORGED)
    except ValueError:
        ours.exception("stopped")
    terminal = capsys.readouterr().err.splitlines()
    assert len(terminal) == 5 and all(line[:2].isdigit() for line in terminal)
    assert "id\\n2026-11-30" in terminal[0], "a line break of an argument is shown"
    written = log_file.read_text().splitlines()
    begun = [line for line in written if line.startswith("2") and "some" in line]
    assert len(begun) == 5
    assert not any(line.startswith("2026-11-30 04:00:00") for line in written)


def test_escape_sequences_reach_no_terminal(
    log_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours.warning("sample %s", SEQUENCES)
    logging.getLogger("some_library").error(SEQUENCES)
    refuse("predict.py", SEQUENCES)
    shown = capsys.readouterr().err
    for text in (shown, log_file.read_text()):
        assert all(character == "\n" or character.isprintable() for character in text)
        assert "\\u001b]0;title\\u0007" in text and "\\u009b31m" in text and "\\ud83d" in text
    assert shown.count("\n") == 3


@pytest.mark.parametrize("text", ["a dog", "çédille 😀 שלום", "C:\\path\\n", "👩‍👩‍👧"])
def test_plain_texts_stay(text: str) -> None:
    assert logs.printable(text) == text == logs.without_secrets(text)


def test_json_stays_json() -> None:
    value = {"image": f"{SEQUENCES}\n{FORGED}", "é": "\x7f"}
    line = logs.printable(json.dumps(value, ensure_ascii=False))
    assert json.loads(line) == value and line.isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hunter22hunter@host/x",
        "s3://hunter22hunter@bucket/x",
        "https://host/x?X-Amz-Signature=hunter22hunter&a=b",
        "https://account.blob/x?sv=1&sig=hunter22hunter",
        "denied for hunter22hunter!",
        "tried AKIAhunter22",
    ],
)
def test_credentials_are_never_logged(
    text: str,
    log_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter22hunter")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAhunter22")
    ours.warning("%s", text)
    ours.warning(text)
    logging.getLogger("some_library").error(text)
    try:
        fail(text)
    except ValueError:
        ours.exception("stopped")
    refuse("predict.py", text)
    for output in (capsys.readouterr().err, log_file.read_text()):
        assert "hunter22" not in output and "***" in output


def test_paths_of_key_files_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/run/secrets/token")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "disabled")
    assert logs.without_secrets("/run/secrets/token disabled") == "/run/secrets/token disabled"


def test_credentials_stay_out_of_the_runs_files(tmp_path: Path) -> None:
    remote = "https://user:hunter22@host/shards"
    manifest = RunManifest(tmp_path, is_main=True)
    manifest.begin({"recipe": {"remote": remote}}, {"command": ["--x", remote]}, {})
    text = (tmp_path / run_folder.RUN_MANIFEST).read_text()
    assert "hunter22" not in text and "https://***@host/shards" in text
    monitor = Monitor(LoggedRun(tmp_path, 1), ["tensorboard"], True, 10, 1)
    monitor.text("recipe", f"remote: {remote}")
    monitor.close()
    events = b"".join(file.read_bytes() for file in tmp_path.rglob("events.*"))
    assert b"hunter22" not in events and b"https://***@host/shards" in events


def test_captions_are_no_markup_on_tensorboard(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> [x](javascript:alert(2)) ![i](//h/i) `c` | b\n| c \x1b[2J"
    monitor = Monitor(LoggedRun(tmp_path, 1), ["tensorboard"], True, 10, 1)
    image = torch.zeros(3, 20, 20, dtype=torch.uint8)
    monitor.pictures(1, "captions", [Panel(image, evil, evil)])
    monitor.close()
    (folder,) = {file.parent for file in tmp_path.rglob("events.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    (event,) = events.Tensors("2_captions/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    from tensorboard.plugin_util import markdown_to_safe_html

    page = markdown_to_safe_html(text)
    assert page.count("<tr>") == 2 and page.count("<td>") == 2, "one row of two cells"
    for tag in ("<script", "<a ", "<img", "<code"):
        assert tag not in page
    assert "alert(1)" in page and "\x1b" not in page


def test_summaries_are_printable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"samples": {"0": {"caption": SEQUENCES, "id": FORGED}}, "a\x1b[2J": FORGED}
    (tmp_path / run_folder.SUMMARY).write_text(json.dumps(content))
    assert show_summary.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(character == "\n" or character.isprintable() for character in shown)
    assert not any(line.startswith("2026-11-30") for line in shown.splitlines())


def bomb(first: str, item: str) -> str:
    lines = [first]
    lines += [f"a{i}: &a{i} {item % ', '.join([f'*a{i - 1}'] * 9)}" for i in range(1, 12)]
    return "\n".join(lines)


BOMBS = {
    "aliases": bomb("a0: &a0 [x, x, x]", "[%s]"),
    "merges": bomb("a0: &a0 {x: 1}", "{<<: [%s]}"),
    "circle": "a: &a [*a]",
    "deep": "[" * 100_000,
    "deep maps": "{a: " * 5_000,
    "large": "x" * (1 << 20),
    "number": "seed: " + "9" * 100_000,
    "date": "seed: 2020-99-99",
    "key": "? 2020-01-01\n: 1",
    "object": "!!python/object/apply:os.system ['touch /tmp/executed']",
    "no text": "\udc80",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BOMBS)
def test_yaml_bombs_are_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(BOMBS[name].encode(errors="surrogateescape"))
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        settings.build(Recipe, settings.read_yaml(file), str(file))
    assert time.perf_counter() - start < 20


def test_aliases_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("a: &a {x: 1, y: [1, 2]}\nb: *a\nc: {<<: *a, x: 2}\n")
    tree = settings.read_yaml(tmp_path / "recipe.yaml")
    assert tree["b"] == tree["a"] and tree["c"] == {"x": 2, "y": [1, 2]}
