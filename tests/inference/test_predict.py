"""tools/predict.py against transformers on the exported folders, whatever the batches; and what it
makes of bad images and bad checkpoints."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blip_scale.commands import predict
from blip_scale.config import recipe as recipes

REPO = Path(__file__).resolve().parent.parent.parent
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TEXTS = ["a big red disc", "a small green cross on grey"]
LENGTHS = ["--max-tokens", "10", "--min-tokens", "4"]


def lines(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> list[dict]:
    """What the command prints."""
    capsys.readouterr()
    assert predict.main([str(part) for part in arguments]) == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def repeated(option: str, values: list[str]) -> list[str]:
    """An option with each of several values."""
    return list(chain.from_iterable((option, value) for value in values))


def opened(answers: list[dict]) -> list[Image.Image]:
    return [Image.open(answer["image"]).convert("RGB") for answer in answers]


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_are_those_of_transformers(
    hf: Path, ours: Path, pictures: Path, beams: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import BlipForConditionalGeneration, BlipProcessor

    arguments = ["--beams", beams, "--scoring", "huggingface", *LENGTHS, "--prompt", "a big"]
    answers = lines(capsys, "caption", pictures, "--model", hf / "captioning", *arguments)
    assert [answer["image"] for answer in answers] == sorted(map(str, pictures.rglob("*.png")))
    reference = BlipForConditionalGeneration.from_pretrained(hf / "captioning")
    processor = BlipProcessor.from_pretrained(hf / "captioning")
    inputs = processor(opened(answers), ["a big"] * len(answers), return_tensors="pt")
    sizes = {"max_length": 10, "min_length": 4}
    # Theirs puts [DEC] in the place of [CLS] and drops [SEP] by itself.
    ids = reference.generate(**inputs, num_beams=beams, do_sample=False, **sizes)
    expected = processor.batch_decode(ids, skip_special_tokens=True)
    assert [f"a big {answer['caption']}".strip() for answer in answers] == expected
    assert len(set(expected)) > 1
    for size in (1, 5):
        again = lines(
            capsys, "caption", pictures, "--model", ours, *arguments, "--batch-size", size
        )
        assert again == answers


def test_sampled_captions_depend_on_seed_and_path_alone(
    ours: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = ["--sample", "--model", ours, *LENGTHS]
    answers = lines(capsys, "caption", pictures, *sample)
    some = lines(capsys, "caption", *[answer["image"] for answer in answers[::-3]], *sample)
    captions = {answer["image"]: answer["caption"] for answer in answers}
    assert all(captions[answer["image"]] == answer["caption"] for answer in some)
    assert len({answer["caption"] for answer in answers}) > 8
    other = lines(capsys, "caption", pictures, *sample, "--seed", 1)
    assert sum(a == b for a, b in zip(answers, other, strict=True)) < 8


@torch.no_grad()
def test_matches_are_those_of_transformers(
    hf: Path, ours: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import BlipForImageTextRetrieval, BlipProcessor

    texts = repeated("--text", TEXTS)
    answers = lines(capsys, "match", pictures, *texts, "--model", hf / "retrieval")
    reference = BlipForImageTextRetrieval.from_pretrained(hf / "retrieval")
    processor = BlipProcessor.from_pretrained(hf / "retrieval")
    for number, text in enumerate(TEXTS):
        of_text = answers[number :: len(TEXTS)]
        assert {answer["text"] for answer in of_text} == {text}
        inputs = processor(opened(of_text), [text] * len(of_text), return_tensors="pt")
        cosines = reference(**inputs, use_itm_head=False).itm_score[:, 0]
        inputs["input_ids"][:, 0] = reference.config.text_config.enc_token_id
        itm = reference(**inputs).itm_score.softmax(-1)[:, 1]
        probabilities = torch.tensor([answer["itm"] for answer in of_text])
        similarities = torch.tensor([answer["itc"] for answer in of_text])
        torch.testing.assert_close(probabilities, itm, **CLOSE)
        torch.testing.assert_close(similarities, cosines, **CLOSE)
        assert itm.std() > 0.01 and cosines.std() > 0.01
    again = lines(capsys, "match", pictures, *texts, "--model", ours, "--batch-size", 3)
    for first, other in zip(answers, again, strict=True):
        assert (first["image"], first["text"]) == (other["image"], other["text"])
        assert first["itm"] == pytest.approx(other["itm"], abs=1e-5)


@torch.no_grad()
def test_answers_are_those_of_transformers(
    hf: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import BlipForQuestionAnswering, BlipProcessor

    asked = ["a red disc?", "a big black cross and a small bar?"]
    questions = repeated("--question", asked)
    answers = lines(capsys, "vqa", pictures, *questions, "--model", hf / "vqa")
    reference = BlipForQuestionAnswering.from_pretrained(hf / "vqa")
    processor = BlipProcessor.from_pretrained(hf / "vqa")
    for answer in answers:
        inputs = processor(opened([answer]), answer["question"], return_tensors="pt")
        inputs["input_ids"][:, 0] = reference.config.text_config.vocab_size - 1  # [ENC]
        ids = reference.generate(**inputs, num_beams=3, max_length=10, min_length=1)
        assert answer["answer"] == processor.decode(ids[0], skip_special_tokens=True)
    assert [answer["question"] for answer in answers[:2]] == asked
    assert len({answer["answer"] for answer in answers}) > 1


def test_features_and_search_agree(
    ours: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the cosines of `match`; as arrays and as lines; the best few ordered anew by matching."""
    rows = lines(capsys, "embed", pictures, "--model", ours)
    assert not lines(capsys, "embed", pictures, "--model", ours, "--out", tmp_path / "f.npz")
    arrays = np.load(tmp_path / "f.npz")
    assert arrays["images"].tolist() == [answer["image"] for answer in rows]
    np.testing.assert_allclose(
        arrays["features"], [answer["features"] for answer in rows], atol=1e-6
    )
    np.testing.assert_allclose(np.linalg.norm(arrays["features"], axis=1), 1, atol=1e-6)
    matched = lines(capsys, "match", pictures, "--text", TEXTS[0], "--model", ours)
    best = sorted(matched, key=lambda answer: -answer["itc"])
    search = ["search", pictures, "--text", TEXTS[0], "--model", ours]
    answers = lines(capsys, *search, "--top", 4)
    assert [answer["image"] for answer in answers] == [answer["image"] for answer in best[:4]]
    assert [answer["rank"] for answer in answers] == [1, 2, 3, 4]
    again = lines(capsys, *search, "--rerank", 6)
    reranked = sorted(best[:6], key=lambda answer: -answer["itm"])
    assert [answer["image"] for answer in again] == [answer["image"] for answer in reranked]
    for first, other in zip(again, reranked, strict=True):
        assert (first["itm"], first["itc"]) == pytest.approx((other["itm"], other["itc"]), abs=1e-5)


def test_words_are_explained_on_a_sheet_an_image(
    ours: Path, hf: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The probability of `match`; the checkpoint's own caption without a text; no image is
    overwritten."""
    sheets = tmp_path / "sheets"
    text = "A big, red disc."
    explain = ["explain", pictures, "--model", ours, "--sheets", sheets]
    answers = lines(capsys, *explain, "--text", text)
    matched = lines(capsys, "match", pictures, "--text", text, "--model", ours)
    assert len(answers) == len(matched) == 16
    for answer, match in zip(answers, matched, strict=True):
        assert (answer["image"], answer["text"]) == (match["image"], "a big, red disc")
        assert answer["itm"] == pytest.approx(match["itm"], abs=1e-5)
        assert answer["words"] == ["a", "big", "red", "disc"]
    files = {answer["sheet"] for answer in answers}
    assert files == set(map(str, sheets.iterdir())) and len(files) == 16
    sizes = {Image.open(file).size for file in files}
    assert len(sizes) == 1, "five panels, four of them in the first row"
    again = lines(capsys, *explain, "--text", text, "--batch-size", 3)
    assert [{**answer, "itm": 0} for answer in again] == [{**row, "itm": 0} for row in answers]
    captions = [row["caption"] for row in lines(capsys, "caption", pictures, "--model", ours)]
    explained = lines(capsys, *explain, code=1)
    assert [row.get("text", "") for row in explained] == captions
    (empty,) = [row for row in explained if "error" in row]
    assert empty["error"] == "the checkpoint's caption of it holds no word; give --text"
    judged = lines(capsys, *explain[:2], "--model", hf / "retrieval", "--text", text, *explain[4:])
    assert [row["itm"] for row in judged] == pytest.approx(
        [row["itm"] for row in answers], abs=1e-5
    )


def test_a_sheet_never_replaces_an_image(
    ours: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = next(pictures.glob("*.png"))
    for name in ("a.png", "a.jpg", "a.words.png", "deeper/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(source, tmp_path / name)
    arguments = ["explain", tmp_path, "--model", ours, "--text", "a disc", "--sheets", tmp_path]
    answers = lines(capsys, *arguments)
    names = [Path(answer["sheet"]).name for answer in answers]
    assert names == ["a_2.words.png", "a_3.words.png", "a.words.words.png", "a_4.words.png"]
    assert (tmp_path / "a.words.png").read_bytes() == source.read_bytes()


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
    arguments = [str(value) for value in ("caption", *paths, "--model", ours, "--out", out)]
    assert predict.main([*arguments, "--batch-size", size]) == 1
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["image"] for answer in answers] == list(map(str, paths))
    assert [sorted(answer) for answer in answers] == [
        ["caption", "image"], ["error", "image"], ["error", "image"], ["caption", "image"],
    ]  # fmt: skip
    message = capsys.readouterr().err.splitlines()[-1]
    assert message == f"2 of 4 images failed: {paths[1]}, {paths[2]}"
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
    answers = [answer["image"] for answer in lines(capsys, "embed", *arguments)]
    assert answers == [str(odd), *sorted(str(path) for path in pictures.rglob("*red*"))]
    odd.unlink()
    answers = [answer["image"] for answer in lines(capsys, "embed", odd, "--model", ours)]
    assert answers == [str(tmp_path / "a1.png")]


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
    answers = lines(capsys, *arguments, "--beams", 4, "--captions", 3)
    reference = BlipForConditionalGeneration.from_pretrained(hf / "captioning")
    processor = BlipProcessor.from_pretrained(hf / "captioning")
    inputs = processor(opened(answers), return_tensors="pt")
    sizes = {"max_length": 10, "min_length": 4, "num_beams": 4, "num_return_sequences": 3}
    expected = processor.batch_decode(
        reference.generate(**inputs, **sizes), skip_special_tokens=True
    )
    captions = list(chain.from_iterable(answer["captions"] for answer in answers))
    assert captions == expected
    assert len(set(expected)) > len(answers)
    best = lines(capsys, *arguments, "--beams", 4)
    assert [answer["captions"][0] for answer in answers] == [answer["caption"] for answer in best]

    sample = ["caption", pictures, "--model", ours, *LENGTHS, "--sample"]
    drawn = lines(capsys, *sample, "--captions", 3)
    assert drawn == lines(capsys, *sample, "--captions", 3, "--batch-size", 1)
    single = lines(capsys, *sample)
    assert [row["captions"][0] for row in drawn] == [row["caption"] for row in single]
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
        (["caption", "--out", "TMP"], "OURS", "is a folder: give the name of a file"),
        (["caption", "--out", "TMP/x.csv"], "OURS", "answers are lines of JSON; give a name that"),
        (["embed", "--out", "TMP/x.csv"], "OURS", "ends in .jsonl, or in .npz for arrays"),
        (["caption", "--out", "TMP/other/vocab.txt/x"], "OURS", "is a file, but a folder is need"),
        (["vqa", "--question", "a"], "TMP/run", "is a pretrain checkpoint; vqa takes one of"),
        (["caption", "--captions", "2"], "TMP/run", "width 1 finds 1 to 1 captions"),
        (["caption", "--batch-size", "0"], "OURS", "--batch-size 0: expected 1 or more"),
        (["caption", "--threads", "0"], "OURS", "--threads 0: expected 1 or more"),
        (["caption", "--beams", "0"], "OURS", "--beams 0: expected 1 or more"),
        (["caption", "--beams", "100000"], "OURS", "--beams 100000: expected at most 100"),
        (["caption", "--captions", "101"], "OURS", "--captions 101: expected at most 100"),
        (["caption", "--threads", "9999"], "OURS", "--threads 9999: expected at most 1024"),
        (["match", "--text", "a", "--text", "!!!"], "OURS", "the text '!!!' holds no word; give"),
        (["search", "--text", ""], "OURS", "the text '' holds no word; give one with words"),
        (["vqa", "--question", "?"], "HF/vqa", "the question '?' holds no word; give one with"),
        (["embed", "--recipe", "TMP"], "OURS", "is a folder; give a YAML file, or a recipe's n"),
        (["caption", "--captions", "4"], "OURS", "width 3 finds 1 to 3 captions of an image"),
        (["caption", "--captions", "2", "--beams", "1"], "OURS", "greedy search (--beams 1)"),
        (["caption", "--sample", "--top-p", "0"], "OURS", "--top-p 0.0: expected a share above 0"),
        (["caption", "--sample", "--top-p", "nan"], "OURS", "--top-p nan: expected a share"),
        (["caption", "--max-tokens", "1"], "OURS", "--max-tokens 1: expected 2 or more"),
        (["search", "--text", "a", "--top", "-1"], "OURS", "--top -1: expected 1 or more"),
        (["search", "--text", "a", "--rerank", "-1"], "OURS", "--rerank -1: expected 0 or more"),
        (["explain", "--text", " ?"], "OURS", "the text ' ?' holds no word; give one with words"),
        (["explain"], "HF/retrieval", "retrieval checkpoint and writes no captions; give --text"),
        (["explain", "--text", "a"], "HF/captioning", "captioning checkpoint; match takes one of"),
        (["explain", "--out", "TMP/x.npz"], "OURS", "only features go into an .npz; give a name"),
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
        arguments = [word.replace(name, place) for word in arguments]
    assert predict.main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err.splitlines()[-1] and not printed.out
    assert printed.err.splitlines()[-1].startswith("predict.py: ")


@pytest.fixture
def spoilt(ours: Path, hf: Path, tmp_path: Path) -> dict[str, str]:
    """Places by their names in the cases: a checkpoint that was cut, another tokenizer, and
    a run without weights."""
    from transformers import BertTokenizerFast

    shutil.copytree(ours, tmp_path / "cut")
    file = tmp_path / "cut" / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    other = tmp_path / "other"
    other.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abc"]
    (other / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast.from_pretrained(other).save_pretrained(other)
    step = tmp_path / "run" / "checkpoints" / "step_00000001"
    step.mkdir(parents=True)
    (step / "manifest.json").touch()  # no weights
    greedy = recipes.load("demo", ["evaluation.num_beams=1"])
    (tmp_path / "run" / "recipe.yaml").write_text(recipes.to_yaml(greedy))
    return {"OURS": str(ours), "HF": str(hf), "TMP": str(tmp_path)}


def test_existing_files_and_images_are_kept(
    ours: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "a.jsonl"  # an image by its content
    image.write_bytes(next(pictures.glob("*.png")).read_bytes())
    before = image.read_bytes()
    arguments = ["embed", str(image), "--model", str(ours), "--out"]
    for out, flags, message in (
        (image, [], "is an input of this command"),
        (image, ["--overwrite"], "is an input of this command"),
        (tmp_path / "b.jsonl", [], ""),
        (tmp_path / "b.jsonl", [], "exists: give another name, or --overwrite"),
        (tmp_path / "b.jsonl", ["--overwrite"], ""),
    ):
        assert predict.main([*arguments, str(out), *flags]) == (2 if message else 0)
        assert message in capsys.readouterr().err
    assert image.read_bytes() == before


def test_without_an_image(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for pattern in (tmp_path, tmp_path / "*.jpg", tmp_path / "no.jpg"):
        assert predict.main(["embed", str(pattern), "--model", str(ours)]) == 2
        assert capsys.readouterr().err == f"predict.py: {pattern}: there is no image\n"
