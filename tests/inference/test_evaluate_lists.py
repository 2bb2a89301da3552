"""tools/evaluate.py on annotation files: what a test server would reject is refused before."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from blip_scale.commands import evaluate
from blip_scale.data.conversion.pairs import Source
from blip_scale.data.heldout.listed import listed_pairs
from blip_scale.data.sources.readers import READERS
from blip_scale.tasks import captioning


def test_images_with_one_id_make_no_submission(
    ours: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """COCO's ids are the digits of file names, which two folders may share."""
    names = ["val2014/COCO_val2014_000000000042.png", "train2014/COCO_train2014_000000000042.png"]
    source = next(pictures.glob("*.png"))
    for name in names:
        (tmp_path / name).parent.mkdir()
        shutil.copy(source, tmp_path / name)
    listed, out = tmp_path / "list.json", tmp_path / "out.json"
    arguments = ["captioning", str(ours), str(listed), "--submission", str(out)]
    listed.write_text(json.dumps([{"image": name} for name in names]))
    assert evaluate.main(arguments) == 2
    assert not out.exists()
    message = capsys.readouterr().err
    assert f"{names[0]} and {names[1]} would both have the image_id 42" in message
    listed.write_text(json.dumps([{"image": n, "img_id": i} for i, n in enumerate(names)]))
    assert evaluate.main(arguments) == 0
    bar = capsys.readouterr().err
    assert "evaluating: 100%" in bar and "1/1 " in bar
    assert [entry["image_id"] for entry in json.loads(out.read_text())] == [0, 1]


def test_ranks_of_mpirun_that_are_not_whole_are_refused(
    ours: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each process would take itself for the only one, and write the same files."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert evaluate.main(["captioning", str(ours), "list.json"]) == 2
    assert "MPI started several processes" in capsys.readouterr().err


def test_a_setting_without_effect_is_refused(
    ours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["captioning", str(ours), "list.json", "evaluation.max_pairs=3"]) == 2
    assert "evaluation.max_pairs: this command evaluates the whole set" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_is_named_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text("task: pretrain\n")
    assert evaluate.main(["captioning", str(tmp_path), "list.json"]) == 2
    assert "has not saved a checkpoint yet" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["image", "file_name"])
def test_ids_of_a_list_are_kept_however_its_images_are_named(tmp_path: Path, key: str) -> None:
    """A leading ./ does not hide `img_id`; the key of the image does not matter."""
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([{key: "./a.png", "img_id": 7}]))
    items = [i for c in READERS["coco"].chunks(Source(str(listed))) for i in c.read()]
    ids = captioning.image_ids(listed_pairs("a", items, 32), str(listed))
    assert ids == [7]
    packed = tmp_path / "list.json.gz"
    packed.write_bytes(gzip.compress(listed.read_bytes()))
    assert captioning.image_ids(listed_pairs("a", items, 32), str(packed)) == [7]
