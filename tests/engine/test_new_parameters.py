"""Test additional trainable parameters, which no published BLIP has and no format maps.

They are trained, saved, resumed and loaded, and an export names them.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
import torch
import train_with_new_parameters
from train_with_new_parameters import OFFSET, SCALE

from blip_scale.commands import convert_checkpoint
from blip_scale.config import recipe as recipes
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.inference.loading import load_blip
from blip_scale.inference.sizes import med_config
from blip_scale.interop.blip_weights import BlipWeights
from blip_scale.interop.checkpoints import head_parameters, read_checkpoint
from blip_scale.interop.huggingface import write_huggingface
from blip_scale.interop.salesforce_files import write_salesforce
from blip_scale.model.med import MED
from blip_scale.tasks.pretrain import Pretrain

pytestmark = pytest.mark.multiprocess

SCRIPT = Path(train_with_new_parameters.__file__)
KINDS = ("weight", "exp_avg", "exp_avg_sq", "momentum")


def train(recipe: Path, stage: int = 3) -> Path:
    processes = tiny_runs.launch(recipe, 1, stage=stage, script=SCRIPT)
    assert tiny_runs.finish(processes) == [0], tiny_runs.said(recipe)
    return recipe.parent / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of two steps, with a checkpoint at each step."""
    folder = tmp_path_factory.mktemp("new_parameters")
    return train(
        tiny_runs.make_recipe(folder, train={"max_steps": 2}, checkpoint={"every_steps": 1})
    )


@pytest.fixture
def with_new_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the new parameters to the networks of this process."""
    train_with_new_parameters.add(monkeypatch.setattr)


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def test_they_train_and_resume(trained: Path, tmp_path: Path) -> None:
    first, second = (tiny_runs.whole_tensors(checkpoint(trained, n), "weight") for n in (1, 2))
    for name, size in ((SCALE, 2), (OFFSET, 3)):
        assert first[name].shape == (size,)
        assert not torch.equal(first[name], second[name]), name
    recipe = tiny_runs.make_recipe(tmp_path, train={"max_steps": 2}, checkpoint={"every_steps": 1})
    shutil.copytree(checkpoint(trained, 1), checkpoint(tmp_path / "run", 1))
    train(recipe)
    assert "resuming at step 1" in tiny_runs.said(recipe)
    for kind in KINDS:
        expected = tiny_runs.whole_tensors(checkpoint(trained, 2), kind)
        resumed = tiny_runs.whole_tensors(checkpoint(tmp_path / "run", 2), kind)
        assert resumed.keys() == expected.keys() and len(resumed) > 20
        assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items()), kind


def test_they_start_from_the_seed(trained: Path, with_new_parameters: None) -> None:
    """Their initial values depend only on the seed, not on earlier random numbers."""
    recipe = recipes.load(str(trained / "recipe.yaml"))
    task = Pretrain(replace(recipe, seed=7), torch.device("cpu"))
    starts = []
    for drawn_before in (0, 5):
        torch.rand(drawn_before)
        starts.append(task.initial_weights())
    task.close()
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in (SCALE, OFFSET))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        expected = MED(task.config).itm_scale.value
    assert torch.equal(starts[0][SCALE], expected)


def test_they_load_for_inference(trained: Path, with_new_parameters: None) -> None:
    network = load_blip(trained).network
    saved = tiny_runs.whole_tensors(checkpoint(trained, 2), "weight")
    assert torch.equal(network.itm_scale.value, saved[SCALE])


def test_a_network_without_them_refuses_the_checkpoint(trained: Path) -> None:
    message = r"holds another network: med\.itm_scale\.value is unexpected"
    with pytest.raises(ValueError, match=message):
        load_blip(trained)


def test_exports_name_them(
    trained: Path, tmp_path: Path, with_new_parameters: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("blip.pth", "captioner"):
        assert convert_checkpoint.main([str(trained), str(tmp_path / name)]) == 0
        note = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
        assert len(note) == 1 and note[0].startswith("note: ")
        assert SCALE in note[0] and OFFSET in note[0]
    assert convert_checkpoint.main([str(trained), str(tmp_path / "ours"), "--to", "ours"]) == 0
    assert "left out" not in capsys.readouterr().out
    saved = tiny_runs.whole_tensors(checkpoint(trained, 2), "weight")
    copy = tiny_runs.whole_tensors(tmp_path / "ours", "weight")
    assert copy.keys() == saved.keys()
    assert all(torch.equal(copy[name], tensor) for name, tensor in saved.items())


def weights_of(trained: Path) -> BlipWeights:
    recipe = recipes.load(str(trained / "recipe.yaml"))
    return read_checkpoint(trained, med_config(recipe, load_tokenizer(recipe.model.text)))


def test_writers_refuse_what_they_would_drop(
    trained: Path, tmp_path: Path, with_new_parameters: None
) -> None:
    weights = weights_of(trained)
    with pytest.raises(ValueError, match=r"no name for med\.itm_scale\.value, offset\.value"):
        write_salesforce(weights, tmp_path / "blip.pth")
    weights.head = "captioning"
    with pytest.raises(ValueError, match=r"no name for med\.itm_scale\.value, offset\.value"):
        write_huggingface(weights, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_fine_tuning_starts_with_them(
    trained: Path, tmp_path: Path, with_new_parameters: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Fine-tuning loads their trained values from our checkpoint.

    If a file does not have them, they are initialised, and a warning says so.
    """
    config = weights_of(trained).config
    saved = tiny_runs.whole_tensors(checkpoint(trained, 2), "weight")
    state = head_parameters(checkpoint(trained, 2), "retrieval", config)
    assert torch.equal(state[SCALE], saved[SCALE])
    assert torch.equal(state[OFFSET].flatten(), saved[OFFSET])
    pth = tmp_path / "blip.pth"
    assert convert_checkpoint.main([str(trained), str(pth)]) == 0
    caplog.set_level(logging.WARNING)
    caplog.clear()
    state = head_parameters(pth, "retrieval", config, seed=7)
    assert f"{pth} lacks {SCALE}: randomly initialised" in caplog.text
    with torch.random.fork_rng():
        torch.manual_seed(7)
        expected = MED(config).itm_scale.value
    assert torch.equal(state[SCALE], expected) and OFFSET not in state
