"""The encoders exported as ONNX: the README's code gives the checkpoint's features."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from blip_scale.commands import convert_checkpoint
from blip_scale.inference import onnx_export
from blip_scale.inference.images import pixels_of
from blip_scale.inference.loading import Loading, load_blip

TEXTS = ["a big red disc", "small", "a small green cross on grey " * 9]
missing = [name for name in onnx_export.PACKAGES if find_spec(name) is None]
needs_packages = pytest.mark.skipif(bool(missing), reason=f"optional: {', '.join(missing)}")


@pytest.fixture(scope="module")
def exported(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoders of a tiny checkpoint, written over those of an earlier export."""
    folder = tmp_path_factory.mktemp("onnx") / "encoders"
    folder.mkdir()
    (folder / onnx_export.IMAGE_ENCODER).touch()
    assert convert_checkpoint.main([str(ours), str(folder), "--to", "onnx", "--overwrite"]) == 0
    return folder


@needs_packages
def test_the_code_of_its_readme_gives_the_features_of_the_checkpoint(
    exported: Path, ours: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(path.name for path in exported.iterdir())
    assert names == ["README.md", "image_encoder.onnx", "text_encoder.onnx", "tokenizer.json"]
    code = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    assert code is not None
    picture = sorted(pictures.rglob("*.png"))[0]
    monkeypatch.chdir(exported)
    program = code[1].replace("photo.jpg", str(picture))
    program = program.replace('["a dog on a beach", "two cats"]', repr(TEXTS))
    values: dict[str, Any] = {}
    exec(program, values)
    blip = load_blip(ours, Loading(device="cpu"))
    pixels = pixels_of(picture.read_bytes(), blip.image_size, upright=True)
    images = blip.image_features(blip.image_embeds(pixels[None]))
    texts = blip.text_features(TEXTS)
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(torch.from_numpy(values["image_features"]), images, **close)
    torch.testing.assert_close(torch.from_numpy(values["text_features"]), texts, **close)
    assert (texts[0] - texts[2]).abs().max() > 0.1


@needs_packages
def test_other_weights_are_noticed(exported: Path, ours: Path) -> None:
    blip = load_blip(ours, Loading(device="cpu"))
    assert onnx_export.largest_difference(blip, exported) < 1e-5
    with torch.no_grad():
        blip.med.text.layers[0].mlp.fc1.weight[0] += 0.5
    assert onnx_export.largest_difference(blip, exported) > onnx_export.TOLERANCE


def test_refusals_say_what_to_do(
    ours: Path,
    hf: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*arguments: Any) -> str:
        assert convert_checkpoint.main([str(part) for part in arguments]) == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert "exists; give another name, or --overwrite" in refused(ours, tmp_path, "--to", "onnx")
    arguments = ("--to", "onnx", "--overwrite")
    assert "is not a checkpoint that this command wrote" in refused(ours, tmp_path, *arguments)
    assert "leave --head out" in refused(ours, out, "--to", "onnx", "--head", "captioning")
    assert "needs the name of a folder" in refused(ours, tmp_path / "x.pth", "--to", "onnx")
    monkeypatch.setattr(onnx_export, "PACKAGES", ("torch", "no_such_package"))
    message = refused(ours, out, "--to", "onnx")
    assert message.count("\n") == 1 and "pip install no_such_package`" in message
    monkeypatch.setattr(onnx_export, "PACKAGES", ("torch",))
    assert "embed takes one of: pretrain" in refused(hf / "captioning", out, "--to", "onnx")
    assert not out.exists()
