"""tools/predict.py against transformers on the exported folders, whatever the batches; and what it
makes of bad images and bad checkpoints."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blip_scale.commands import predict

REPO = Path(__file__).resolve().parent.parent.parent
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TEXTS = ["a big red disc", "a small green cross on grey"]
LENGTHS = ["--max-tokens", "10", "--min-tokens", "4"]


def lines(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> list[dict]:
    """What the command prints."""
    capsys.readouterr()
    assert predict.main([str(one) for one in arguments]) == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def opened(found: list[dict]) -> list[Image.Image]:
    return [Image.open(one["image"]).convert("RGB") for one in found]


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_are_those_of_transformers(
    hf: Path, ours: Path, pictures: Path, beams: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import BlipForConditionalGeneration, BlipProcessor

    arguments = ["--beams", beams, "--scoring", "huggingface", *LENGTHS, "--prompt", "a big"]
    found = lines(capsys, "caption", pictures, "--model", hf / "captioning", *arguments)
    assert [one["image"] for one in found] == sorted(map(str, pictures.rglob("*.png")))
    theirs = BlipForConditionalGeneration.from_pretrained(hf / "captioning")
    processor = BlipProcessor.from_pretrained(hf / "captioning")
    inputs = processor(opened(found), ["a big"] * len(found), return_tensors="pt")
    sizes = {"max_length": 10, "min_length": 4}
    # Theirs puts [DEC] in the place of [CLS] and drops [SEP] by itself.
    ids = theirs.generate(**inputs, num_beams=beams, do_sample=False, **sizes)
    said = processor.batch_decode(ids, skip_special_tokens=True)
    assert [f"a big {one['caption']}".strip() for one in found] == said
    assert len(set(said)) > 1
    for size in (1, 5):
        again = lines(
            capsys, "caption", pictures, "--model", ours, *arguments, "--batch-size", size
        )
        assert again == found


def test_sampled_captions_depend_on_seed_and_path_alone(
    ours: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = ["--sample", "--model", ours, *LENGTHS]
    found = lines(capsys, "caption", pictures, *sample)
    some = lines(capsys, "caption", *[one["image"] for one in found[::-3]], *sample)
    assert {one["image"]: one["caption"] for one in some}.items() <= {
        one["image"]: one["caption"] for one in found
    }.items()
    assert len({one["caption"] for one in found}) > 8
    other = lines(capsys, "caption", pictures, *sample, "--seed", 1)
    assert sum(a == b for a, b in zip(found, other, strict=True)) < 8


@torch.no_grad()
def test_matches_are_those_of_transformers(
    hf: Path, ours: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import BlipForImageTextRetrieval, BlipProcessor

    texts = [part for text in TEXTS for part in ("--text", text)]
    found = lines(capsys, "match", pictures, *texts, "--model", hf / "retrieval")
    theirs = BlipForImageTextRetrieval.from_pretrained(hf / "retrieval")
    processor = BlipProcessor.from_pretrained(hf / "retrieval")
    for number, text in enumerate(TEXTS):
        mine = found[number :: len(TEXTS)]
        assert {one["text"] for one in mine} == {text}
        inputs = processor(opened(mine), [text] * len(mine), return_tensors="pt")
        cosines = theirs(**inputs, use_itm_head=False).itm_score[:, 0]
        inputs["input_ids"][:, 0] = theirs.config.text_config.enc_token_id
        itm = theirs(**inputs).itm_score.softmax(-1)[:, 1]
        torch.testing.assert_close(torch.tensor([one["itm"] for one in mine]), itm, **CLOSE)
        torch.testing.assert_close(torch.tensor([one["itc"] for one in mine]), cosines, **CLOSE)
        assert itm.std() > 0.01 and cosines.std() > 0.01
    again = lines(capsys, "match", pictures, *texts, "--model", ours, "--batch-size", 3)
    for mine, other in zip(found, again, strict=True):
        assert {key: mine[key] for key in ("image", "text")} == {
            key: other[key] for key in ("image", "text")
        }
        assert mine["itm"] == pytest.approx(other["itm"], abs=1e-5)


@torch.no_grad()
def test_answers_are_those_of_transformers(
    hf: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import BlipForQuestionAnswering, BlipProcessor

    asked = ["a red disc?", "a big black cross and a small bar?"]
    questions = [part for text in asked for part in ("--question", text)]
    found = lines(capsys, "vqa", pictures, *questions, "--model", hf / "vqa")
    theirs = BlipForQuestionAnswering.from_pretrained(hf / "vqa")
    processor = BlipProcessor.from_pretrained(hf / "vqa")
    for one in found:
        inputs = processor(opened([one]), one["question"], return_tensors="pt")
        inputs["input_ids"][:, 0] = theirs.config.text_config.vocab_size - 1  # [ENC]
        ids = theirs.generate(**inputs, num_beams=3, max_length=10, min_length=1)
        assert one["answer"] == processor.decode(ids[0], skip_special_tokens=True)
    assert [one["question"] for one in found[:2]] == asked
    assert len({one["answer"] for one in found}) > 1


def test_features_and_search_agree(
    ours: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the cosines of `match`; as arrays and as lines; the best few ordered anew by matching."""
    rows = lines(capsys, "embed", pictures, "--model", ours)
    assert not lines(capsys, "embed", pictures, "--model", ours, "--out", tmp_path / "f.npz")
    arrays = np.load(tmp_path / "f.npz")
    assert arrays["images"].tolist() == [one["image"] for one in rows]
    np.testing.assert_allclose(arrays["features"], [one["features"] for one in rows], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(arrays["features"], axis=1), 1, atol=1e-6)
    matched = lines(capsys, "match", pictures, "--text", TEXTS[0], "--model", ours)
    best = sorted(matched, key=lambda one: -one["itc"])
    search = ["search", pictures, "--text", TEXTS[0], "--model", ours]
    found = lines(capsys, *search, "--top", 4)
    assert [one["image"] for one in found] == [one["image"] for one in best[:4]]
    assert [one["rank"] for one in found] == [1, 2, 3, 4]
    again = lines(capsys, *search, "--rerank", 6)
    reranked = sorted(best[:6], key=lambda one: -one["itm"])
    assert [one["image"] for one in again] == [one["image"] for one in reranked]
    for mine, other in zip(again, reranked, strict=True):
        assert (mine["itm"], mine["itc"]) == pytest.approx((other["itm"], other["itc"]), abs=1e-5)


@pytest.mark.parametrize("size", ["1", "32"])
def test_bad_images_are_named_and_the_others_answered(
    ours: Path, pictures: Path, tmp_path: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sorted(map(str, pictures.glob("*.png")))[:2]
    whole = Path(good[0]).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    paths = [good[0], tmp_path / "cut.png", tmp_path / "empty.jpg", good[1]]
    out = tmp_path / "out.jsonl"
    arguments = [str(one) for one in ("caption", *paths, "--model", ours, "--out", out)]
    assert predict.main([*arguments, "--batch-size", size]) == 1
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["image"] for one in found] == list(map(str, paths))
    assert [sorted(one) for one in found] == [
        ["caption", "image"], ["error", "image"], ["error", "image"], ["caption", "image"],
    ]  # fmt: skip
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"2 of 4 images failed: {paths[1]}, {paths[2]}"
    assert not list(tmp_path.glob("*.partial"))


def test_photos_are_turned_upright(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a phone writes them: on their side, with a mark that says so."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    encoded = io.BytesIO()
    image.transpose(Image.Transpose.ROTATE_90).save(encoded, "PNG", exif=exif)
    (tmp_path / "b.png").write_bytes(encoded.getvalue())
    upright, turned = lines(capsys, "embed", tmp_path, "--model", ours)
    assert turned["features"] == upright["features"]


def test_images_are_found(
    ours: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files, globs and folders, each image once; a name with brackets is no pattern where it is
    there, whatever the pattern would match."""
    odd = tmp_path / "a[1].png"
    for name in (odd, tmp_path / "a1.png"):
        shutil.copy(next(pictures.glob("*.png")), name)
    arguments = [odd, f"{pictures}/*red*", f"{pictures}/**/*red*", "--model", ours]
    found = [one["image"] for one in lines(capsys, "embed", *arguments)]
    assert found == [str(odd), *sorted(str(path) for path in pictures.rglob("*red*"))]
    odd.unlink()
    found = [one["image"] for one in lines(capsys, "embed", odd, "--model", ours)]
    assert found == [str(tmp_path / "a1.png")]


def test_a_name_that_is_no_utf8_comes_back(ours: Path, pictures: Path, tmp_path: Path) -> None:
    """On a real terminal's stream, in files and in arrays; sampled captions have a seed there."""
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    shutil.copy(next(pictures.glob("*.png")), name)
    command = [sys.executable, str(REPO / "tools" / "predict.py")]
    asked = ["caption", str(tmp_path), "--model", str(ours), "--sample"]
    done = subprocess.run([*command, *asked], capture_output=True, check=True, cwd=REPO)
    (line,) = done.stdout.decode("utf-8").splitlines()
    assert json.loads(line)["image"] == name
    assert predict.main([*asked, "--out", str(tmp_path / "out.jsonl")]) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text("utf-8")) == json.loads(line)
    arguments = ["embed", str(tmp_path), "--model", str(ours), "--out", str(tmp_path / "f.npz")]
    assert predict.main(arguments) == 0
    assert np.load(tmp_path / "f.npz")["images"].tolist() == [name]


def test_several_captions_of_an_image(
    ours: Path, hf: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best of beam search, those of transformers' num_return_sequences; or draws."""
    from transformers import BlipForConditionalGeneration, BlipProcessor

    arguments = ["caption", pictures, "--model", hf / "captioning", *LENGTHS]
    found = lines(capsys, *arguments, "--beams", 4, "--captions", 3)
    theirs = BlipForConditionalGeneration.from_pretrained(hf / "captioning")
    processor = BlipProcessor.from_pretrained(hf / "captioning")
    inputs = processor(opened(found), return_tensors="pt")
    sizes = {"max_length": 10, "min_length": 4, "num_beams": 4, "num_return_sequences": 3}
    said = processor.batch_decode(theirs.generate(**inputs, **sizes), skip_special_tokens=True)
    assert [caption for one in found for caption in one["captions"]] == said
    assert len(set(said)) > len(found)
    best = lines(capsys, *arguments, "--beams", 4)
    assert [one["captions"][0] for one in found] == [one["caption"] for one in best]

    sample = ["caption", pictures, "--model", ours, *LENGTHS, "--sample"]
    drawn = lines(capsys, *sample, "--captions", 3)
    assert drawn == lines(capsys, *sample, "--captions", 3, "--batch-size", 1)
    one = lines(capsys, *sample)
    assert [row["captions"][0] for row in drawn] == [row["caption"] for row in one]
    assert sum(len(set(row["captions"])) > 1 for row in drawn) > 8


@pytest.mark.parametrize(
    ("use", "model", "message"),
    [
        (["caption"], "HF/retrieval", "is a retrieval checkpoint; caption takes one of: pretrain"),
        (["match", "--text", "a"], "HF/captioning", "captioning checkpoint; match takes one of"),
        (["embed"], "HF/vqa", "is a vqa checkpoint; embed takes one of: pretrain, retrieval"),
        (["vqa", "--question", "a"], "OURS", "is a pretrain checkpoint; vqa takes one of: vqa"),
        (["caption"], "TMP/nowhere", "nowhere: no such file or folder"),
        (["caption"], "TMP/cut", "is damaged: size or checksum"),
        (["caption", "--tokenizer", "TMP/other"], "OURS", "tokens with [DEC] and [ENC], the netw"),
        (["caption", "--out", "TMP/x.npz"], "OURS", "only features go into an .npz"),
        (["caption", "--batch-size", "0"], "OURS", "--batch-size 0: expected 1 or more"),
        (["caption", "--threads", "0"], "OURS", "--threads 0: expected 1 or more"),
        (["caption", "--beams", "0"], "OURS", "--beams 0: expected 1 or more"),
        (["caption", "--captions", "4"], "OURS", "width 3 finds 1 to 3 captions of an image"),
        (["caption", "--captions", "2", "--beams", "1"], "OURS", "greedy search (--beams 1)"),
        (["caption", "--sample", "--top-p", "0"], "OURS", "--top-p 0.0: expected a share above 0"),
        (["caption", "--sample", "--top-p", "nan"], "OURS", "--top-p nan: expected a share"),
        (["caption", "--max-tokens", "1"], "OURS", "--max-tokens 1: expected 2 or more"),
        (["search", "--text", "a", "--top", "-1"], "OURS", "--top -1: expected 1 or more"),
        (["search", "--text", "a", "--rerank", "-1"], "OURS", "--rerank -1: expected 0 or more"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    use: list[str],
    model: str,
    message: str,
    spoilt: dict[str, str],
    pictures: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [use[0], str(pictures), "--model", model, *use[1:]]
    for name, place in spoilt.items():
        arguments = [one.replace(name, place) for one in arguments]
    assert predict.main(arguments) == 2
    said = capsys.readouterr()
    assert message in said.err.splitlines()[-1] and not said.out
    assert said.err.splitlines()[-1].startswith("predict.py: ")


@pytest.fixture
def spoilt(ours: Path, hf: Path, tmp_path: Path) -> dict[str, str]:
    """Places by their names in the cases: a checkpoint that was cut, another tokenizer."""
    from transformers import BertTokenizerFast

    shutil.copytree(ours, tmp_path / "cut")
    file = tmp_path / "cut" / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    other = tmp_path / "other"
    other.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abc"]
    (other / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast.from_pretrained(other).save_pretrained(other)
    return {"OURS": str(ours), "HF": str(hf), "TMP": str(tmp_path)}


def test_without_an_image(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for pattern in (tmp_path, tmp_path / "*.jpg", tmp_path / "no.jpg"):
        assert predict.main(["embed", str(pattern), "--model", str(ours)]) == 2
        assert capsys.readouterr().err == f"predict.py: {pattern}: there is no image\n"
