"""Output files are written whole, links are followed, devices and inputs are never replaced."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from blip_scale.storage.files import write_whole
from blip_scale.storage.output_files import check_output, is_stream, written_whole


def test_a_link_is_followed_and_the_file_replaced_whole(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("before")
    link.symlink_to(target)
    with pytest.raises(KeyError), written_whole(link) as place:
        place.write_text("half")
        raise KeyError
    assert target.read_text() == "before"
    write_whole(link, "after")
    assert link.is_symlink() and target.read_text() == "after"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


def test_a_fifo_is_written_straight(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    received = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_text()))
    reader.start()
    check_output(fifo, overwrite=False)
    write_whole(fifo, "text")
    reader.join(timeout=60)
    assert received == ["text"] and fifo.is_fifo()


def test_descriptors_are_streams_whatever_they_lead_to(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        descriptor = Path(f"/proc/self/fd/{file.fileno()}")
        link = tmp_path / "stdout"
        link.symlink_to(descriptor)
        assert is_stream(descriptor) and is_stream(link)
    assert not is_stream(tmp_path / "file") and not is_stream(tmp_path / "new")


def test_inputs_and_existing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    photo, link, hard = tmp_path / "photos/a.jpg", tmp_path / "link", tmp_path / "hard"
    photo.touch()
    link.symlink_to(photo)
    hard.hardlink_to(photo)
    for out in (photo, link, hard):
        with pytest.raises(ValueError, match="is an input of this command"):
            check_output(out, True, [photo])
        with pytest.raises(ValueError, match="exists: give another name, or --overwrite"):
            check_output(out, False)
        check_output(out, True, [tmp_path / "other"])
    with pytest.raises(ValueError, match="lies in the input"):
        check_output(photo, True, [tmp_path / "photos"])
    check_output(tmp_path / "photos/new", False, [tmp_path / "photos"])
