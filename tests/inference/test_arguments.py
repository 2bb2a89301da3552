"""What a program passes to a loaded BLIP: what is refused, and in which words; what is taken as one
text or one path; and that the page docs/python.md runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from blip_scale.inference import predictions
from blip_scale.inference.blip import Blip, draws_of
from blip_scale.inference.images import find_images, pixels_of
from blip_scale.inference.loading import Loading, load_blip
from blip_scale.inference.predictions import CaptionSettings, Reader
from blip_scale.inference.word_maps import word_maps
from blip_scale.model.generation import BeamSettings, NucleusSettings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
TEXTS = ["a big red disc", "a small green cross"]


@pytest.fixture(scope="module")
def blip(ours: Path) -> Blip:
    return load_blip(str(ours), Loading(device="cpu"))


@pytest.fixture(scope="module")
def pixels(pictures: Path) -> Tensor:
    """uint8 [2, 3, 32, 32]."""
    paths = find_images(str(pictures))[:2]
    return torch.stack([pixels_of(Path(path).read_bytes(), 32) for path in paths])


@pytest.fixture(scope="module")
def tokens(blip: Blip, pixels: Tensor) -> Tensor:
    return blip.image_embeds(pixels)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda pixels: pixels / 255, "found float32 [2, 3, 32, 32]"),
        (lambda pixels: pixels.to(torch.int8), "found int8 [2, 3, 32, 32]"),
        (lambda pixels: pixels.long(), "found int64 [2, 3, 32, 32]"),
        (lambda pixels: pixels[:, :1], "found uint8 [2, 1, 32, 32]"),
        (lambda pixels: torch.cat([pixels, pixels[:, :1]], 1), "found uint8 [2, 4, 32, 32]"),
        (lambda pixels: pixels.permute(0, 2, 3, 1), "found uint8 [2, 32, 32, 3]"),
        (lambda pixels: pixels[0], "found uint8 [3, 32, 32]"),
        (lambda pixels: pixels[..., :16, :16], "found uint8 [2, 3, 16, 16]"),
        (lambda pixels: pixels.numpy(), "found a numpy ndarray"),
        (lambda pixels: list(pixels), "found a builtins list"),
        (lambda pixels: Image.new("RGB", (32, 32)), "found a PIL Image"),
    ],
)
def test_other_pixels_are_refused(
    blip: Blip, pixels: Tensor, change: Callable[[Tensor], Any], problem: str
) -> None:
    with pytest.raises(
        ValueError, match=r"uint8 \[images, 3, 32, 32\], found .*pixels_of"
    ) as error:
        blip.image_embeds(change(pixels))
    assert problem in str(error.value)


REFUSED: list[tuple[Callable[[Blip, Tensor], object], str]] = [
    (lambda blip, t: blip.image_features(t.bfloat16()), "bfloat16 on cpu, but the network is floa"),
    (lambda blip, t: blip.image_features(t[0]), "expected the tensor [images, tokens, 48]"),
    (lambda blip, t: blip.captions(t.double()), "float64 on cpu, but"),
    (lambda blip, t: blip.captions(t[..., :8]), "found [2, 17, 8]"),
    (lambda blip, t: blip.captions(t, prompt=["a"]), "prompt: expected one str for all images"),  # type: ignore[arg-type]
    (lambda blip, t: blip.captions(t, BeamSettings(10**5)), "num_beams: 100000: expected 1 to 100"),
    (
        lambda blip, t: blip.captions(t, NucleusSettings(), draws=draws_of("a", 0, 30)),
        "draws: expected [2, 30], a row for each image, found [1, 30]",
    ),
    (lambda blip, t: blip.match(t.half(), TEXTS, [0, 1]), "float16 on cpu, but"),
    (lambda blip, t: blip.match(t, TEXTS, [0]), "owners: 1 for 2 texts"),
    (
        lambda blip, t: blip.match(t, TEXTS, [0, 2]),
        "owners: 2 (item 1) is not the index of one of 2 images",
    ),
    (lambda blip, t: blip.match(t, TEXTS, [-1, 0]), "owners: -1 (item 0) is not the index"),
    (lambda blip, t: blip.match(t, TEXTS, [0.5, 1]), "owners: expected the index of an image"),  # type: ignore[list-item]
    (lambda blip, t: blip.match(t, "a", 0), "owners: expected the index of an image"),  # type: ignore[arg-type]
    (lambda blip, t: blip.match(t, [b"a"], [0]), "texts: item 0 is bytes, not str"),  # type: ignore[list-item]
    (lambda blip, t: blip.text_features(5), "texts: expected a str or several, found int"),  # type: ignore[arg-type]
    (lambda blip, t: word_maps(blip, t, "a disc"), "captions: 1 for 2 images; give one each"),
    (lambda blip, t: pixels_of("photo.png", 32), "image: expected the bytes of a file"),  # type: ignore[arg-type]
    (
        lambda blip, t: list(
            predictions.captions(
                Reader(blip), "x.png", CaptionSettings(NucleusSettings(), count=999)
            )
        ),
        "captions: 999 of an image, expected 1 to 100",
    ),
]


@pytest.mark.parametrize(("use", "problem"), REFUSED, ids=[problem for _, problem in REFUSED])
def test_other_arguments_are_refused(
    blip: Blip, tokens: Tensor, use: Callable[[Blip, Tensor], object], problem: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        use(blip, tokens)


def test_a_single_text_is_one_text(blip: Blip, hf: Path, tokens: Tensor, pixels: Tensor) -> None:
    assert torch.equal(blip.text_features(TEXTS[0]), blip.text_features(TEXTS[:1]))
    assert torch.equal(blip.match(tokens, TEXTS[0], [1]), blip.match(tokens, TEXTS[:1], [1]))
    assert len(word_maps(blip, tokens[:1], TEXTS[0])) == len(draws_of("a", 0, 3)) == 1
    vqa = load_blip(hf / "vqa", Loading(device="cpu"))
    seen = vqa.image_embeds(pixels)
    assert vqa.answers(seen, "a disc?", [0]) == vqa.answers(seen, ["a disc?"], [0])
    assert vqa.answers(seen, [], []) == []


def test_nothing_gives_nothing(blip: Blip, tokens: Tensor) -> None:
    assert blip.text_features([]).shape == (0, 16)
    assert blip.match(tokens, [], []).shape == (0,)
    assert blip.image_features(tokens[:0]).shape == (0, 16)
    assert draws_of([], 0, 3).shape == (0, 3)


def test_a_single_path_is_one_path(blip: Blip, pictures: Path) -> None:
    paths = find_images(pictures)
    assert paths == find_images(str(pictures)) == find_images([pictures]) and len(paths) == 16
    with pytest.raises(FileNotFoundError, match="'': there is no image; give a file"):
        find_images([""])
    (answer,) = predictions.features(Reader(blip), paths[0])
    assert answer["image"] == paths[0] and "features" in answer


def test_a_pil_image_has_the_pixels_of_its_file(pictures: Path) -> None:
    file = Path(find_images(pictures)[0])
    assert torch.equal(pixels_of(Image.open(file), 32), pixels_of(file.read_bytes(), 32))
    clear = Image.fromarray(np.zeros((8, 8, 4), np.uint8))
    assert bool((pixels_of(clear, 32) == 255).all()), "transparent pixels are white"


def test_tokens_can_have_gradients(blip: Blip, tokens: Tensor) -> None:
    leaf = tokens.clone().requires_grad_()
    blip.med.project_image(leaf)[0, 0].backward()
    assert leaf.grad is not None and bool(leaf.grad.any())
    assert not tokens.is_inference()


def test_loading_is_checked(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="precision fp16: expected one of bf16, fp32"):
        load_blip(ours, Loading(precision="fp16"))
    with pytest.raises(ValueError, match="image_size 10000000: expected 1 to 4096 pixels"):
        load_blip(ours, Loading(image_size=10**7))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="hf download some/blip --local-dir blip, then"):
        load_blip("some/blip")
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match=r"runs/typo: no such file or folder$"):
        load_blip("runs/typo")


def test_the_page_runs(
    ours: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block of docs/python.md, one after the other."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(ours)
    (tmp_path / "my_images").symlink_to(pictures)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.+?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    assert len(blocks) > 5
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["blip"].origin and len(names["paths"]) == 8
