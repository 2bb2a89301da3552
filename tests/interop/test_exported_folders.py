"""Transformers computes the same numbers from an exported folder as our own model.

The other supported major version of transformers is tested as well.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import tiny_blip
import tiny_runs
import torch
from PIL import Image
from tiny_blip import Convert
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from virtual_environments import make_environment

from blip_scale.config.model_recipe import TextRecipe
from blip_scale.data.pixels.transforms import (
    IMAGE_MEAN,
    IMAGE_STD,
    EvalTransform,
    normalize_images,
)
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.interop.checkpoints import read_checkpoint
from blip_scale.interop.huggingface import write_processor
from blip_scale.interop.output_settings import published
from blip_scale.model.generation import BeamSettings, caption_beam
from blip_scale.model.med import MED
from blip_scale.model.packing import ImageIndex, PackedText, plan_pass

REPO = Path(__file__).resolve().parent.parent.parent
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TEXTS = ["a big red disc", "a small green cross on grey", "a black bar and a white square"]
LENGTHS = {"max_length": 10, "min_length": 4}


@pytest.fixture(scope="module")
def hf(ours: Path, tmp_path_factory: pytest.TempPathFactory, convert: Convert) -> Path:
    """Folders captioning, retrieval and vqa."""
    return convert(ours, tmp_path_factory.mktemp("hf") / "hf", "--head", "all")


@pytest.fixture(scope="module")
def med(ours: Path) -> MED:
    return tiny_blip.med_of(read_checkpoint(ours))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Drawings as PNG files."""
    folder = tmp_path_factory.mktemp("pictures")
    drawn = [("red", "disc", True), ("green", "cross", False), ("black", "bar", True)]
    files = [folder / f"{colour}.png" for colour, *_ in drawn]
    for file, what in zip(files, drawn, strict=True):
        file.write_bytes(tiny_runs.picture(*what))
    return files


def pixels(pictures: list[Path]) -> Tensor:
    """Images as our own evaluation passes them to the network."""
    transform = EvalTransform(32)
    images = [transform(Image.open(file).convert("RGB")) for file in pictures]
    return normalize_images(torch.stack(images), torch.float32)


def packed(hf: Path, med: MED) -> tuple[PackedText, Tensor]:
    """Packed texts, and the same texts padded with an attention mask for transformers."""
    tokenizer = load_tokenizer(TextRecipe(tokenizer=str(hf / "vqa")))
    rows = tokenizer(TEXTS)["input_ids"]
    mask = tokenizer(TEXTS, padding=True, return_tensors="pt")["attention_mask"]
    return PackedText.from_lists(rows), mask


@torch.no_grad()
def test_retrieval_scores(hf: Path, med: MED, pictures: list[Path]) -> None:
    """Cosines and matching logits from files and words, through BlipProcessor."""
    from transformers import BlipForImageTextRetrieval, BlipProcessor

    processor = BlipProcessor.from_pretrained(hf / "retrieval")
    reference = BlipForImageTextRetrieval.from_pretrained(hf / "retrieval")
    images = [Image.open(file).convert("RGB") for file in pictures]
    inputs = processor(images, TEXTS, padding=True, return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], pixels(pictures), **CLOSE)
    text, _ = packed(hf, med)
    embeds = med.encode_image(pixels(pictures))
    cosines = med.project_image(embeds) @ med.project_text(med.encode_text(text)).T
    expected = reference(**inputs, use_itm_head=False).itm_score
    torch.testing.assert_close(cosines, expected, **CLOSE)
    assert cosines.std() > 0.01
    special = med.config.text.special
    assert reference.config.text_config.enc_token_id == special.enc
    inputs["input_ids"][:, 0] = special.enc
    logits = med.match(text.with_first_token(special.enc), embeds, torch.arange(3))
    torch.testing.assert_close(logits, reference(**inputs).itm_score, **CLOSE)
    assert reference.config.itc_temperature == med.temperature().item()


def without_ends(ids: list[int], sep: int) -> list[int]:
    """Tokens between [DEC] and the first [SEP]."""
    return ids[1 : ids.index(sep) if sep in ids else None]


def answer(hf: Path, med: MED, image: Tensor, question: str, settings: BeamSettings) -> list[int]:
    """Answers of our own model, whose decoder reads all states of the image-grounded question."""
    tokenizer = load_tokenizer(TextRecipe(tokenizer=str(hf / "vqa")))
    special = med.config.text.special
    ids = [special.enc, *tokenizer(question)["input_ids"][1:]]
    embeds = med.encode_image(image[None])
    where = ImageIndex(1, embeds.shape[1], encoder=torch.zeros(1, dtype=torch.int64))
    plan = plan_pass(PackedText.from_lists([ids]), None, where, takes_packed=False)
    states = med.text(replace(plan, read_rows=None, read_cross=plan.cross), embeds)
    return caption_beam(med, states[None], [special.dec], settings)[0]


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_token_for_token(hf: Path, med: MED, pictures: list[Path], beams: int) -> None:
    from transformers import BlipForConditionalGeneration

    reference = BlipForConditionalGeneration.from_pretrained(hf / "captioning")
    images, special = pixels(pictures), med.config.text.special
    sequences = reference.generate(images, num_beams=beams, do_sample=False, **LENGTHS).tolist()
    captions = [without_ends(ids, special.sep) for ids in sequences]
    settings = BeamSettings(num_beams=beams, **LENGTHS, scoring="huggingface")
    ours = caption_beam(med, med.encode_image(images), [special.dec], settings)
    assert ours == captions
    assert len({tuple(caption) for caption in ours}) > 1


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_answers_token_for_token(hf: Path, med: MED, pictures: list[Path], beams: int) -> None:
    """The decoder reads all states of the image-grounded question."""
    from transformers import BlipForQuestionAnswering

    reference = BlipForQuestionAnswering.from_pretrained(hf / "vqa")
    tokenizer = load_tokenizer(TextRecipe(tokenizer=str(hf / "vqa")))
    special, answers = med.config.text.special, set()
    settings = BeamSettings(num_beams=beams, **LENGTHS, scoring="huggingface")
    for image, question in zip(pixels(pictures), TEXTS, strict=True):
        ids = [special.enc, *tokenizer(question)["input_ids"][1:]]
        expected = reference.generate(
            torch.tensor([ids]), image[None], num_beams=beams, do_sample=False, **LENGTHS
        )[0].tolist()
        ours = answer(hf, med, image, question, settings)
        assert ours == without_ends(expected, special.sep)
        answers.add(tuple(ours))
    assert len(answers) > 1


def test_the_pipeline_just_works(hf: Path, med: MED, pictures: list[Path]) -> None:
    """A pipeline gives the words of our own beam search for a picture's path."""
    from transformers import pipeline

    if version("transformers") < "5":
        captioner = pipeline("image-to-text", str(hf / "captioning"))
        # 4.57 mistakes a max_length of 20 for its own default, and uses 256 new tokens instead.
        length = {"max_new_tokens": 20}
        captions = [captioner(str(file), generate_kwargs=length) for file in pictures]
        generated = [caption[0]["generated_text"] for caption in captions]
    else:
        captioner = pipeline("image-text-to-text", str(hf / "captioning"))
        captioner.model.text_decoder.generation_config = captioner.model.generation_config
        asked = [captioner(str(file), text="") for file in pictures]
        generated = [captions[0]["generated_text"] for captions in asked]
    special = med.config.text.special
    # 4.57 adds the length of the prompt to its own default.
    longest = 21 if version("transformers") < "5" else 20
    beam = published("pretrain").beam()
    settings = replace(beam, scoring="huggingface", max_length=longest)
    ours = caption_beam(med, med.encode_image(pixels(pictures)), [special.dec], settings)
    tokenizer = load_tokenizer(TextRecipe(tokenizer=str(hf / "captioning")))
    assert generated == tokenizer.batch_decode(ours, skip_special_tokens=True)
    assert all(generated) and len(set(generated)) > 1


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Noisy pictures of several sizes, whose pixels depend on how they are resized."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number, size in enumerate([(90, 131), (45, 70), (200, 33)]):
        noise = Image.fromarray(draw.integers(0, 256, (7, 6, 3), dtype=np.uint8))
        noise.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(TEXTS[number])
    return sorted(folder.glob("*.png"))


def special_words(ours: Path, folder: Path) -> PreTrainedTokenizerFast:
    """Files of a processor with a special token that BLIP does not have."""
    tokenizer = load_tokenizer(TextRecipe(tokenizer=str(ours / "tokenizer")))
    tokenizer.add_special_tokens({"additional_special_tokens": ["[X]"]})
    folder.mkdir()
    write_processor(folder, tokenizer, 32, IMAGE_MEAN, IMAGE_STD)
    return tokenizer


def test_special_tokens_of_a_tokenizer_come_back(ours: Path, tmp_path: Path) -> None:
    """Transformers 4 and 5 and our own loader all read the special token."""
    from transformers import BlipProcessor

    words = special_words(ours, tmp_path / "words")
    config = json.loads((tmp_path / "words" / "tokenizer_config.json").read_text())
    assert config["additional_special_tokens"] == ["[X]"]
    assert not isinstance(config.get("extra_special_tokens"), list)
    ids = words("a [X] red")["input_ids"]
    assert words.convert_tokens_to_ids("[X]") in ids and words.unk_token_id not in ids
    for again in (
        BlipProcessor.from_pretrained(tmp_path / "words").tokenizer,
        load_tokenizer(TextRecipe(tokenizer=str(tmp_path / "words"))),
    ):
        assert again("a [X] red")["input_ids"] == ids
        assert again.decode(ids, skip_special_tokens=True) == "a red"


@pytest.mark.multiprocess
@torch.no_grad()
def test_the_other_transformers_reads_them(
    ours: Path, hf: Path, med: MED, photos: list[Path], tmp_path: Path
) -> None:
    """Transformers 4.57 with NumPy 2.1 reads files written by version 5, or the reverse."""
    exports = tmp_path / "exports"
    shutil.copytree(hf, exports)
    words = special_words(ours, exports / "words")
    pins = "requirements.txt" if version("transformers") < "5" else "requirements-oldest.txt"
    lines = (REPO / pins).read_text().splitlines()
    wanted = [line for line in lines if line.startswith(("transformers==", "numpy=="))]
    commands = make_environment(tmp_path / "other", wanted)
    report = tmp_path / "report.json"
    script = Path(__file__).with_name("read_exports.py")
    done = subprocess.run(
        [str(commands / "python"), str(script), str(exports), str(photos[0].parent), str(report)],
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(report.read_text())
    assert f"transformers=={results['transformers']}" in wanted
    warned, _, warned_by_cards = done.stderr.partition("cards\n")
    assert warned == ""
    for line in warned_by_cards.splitlines():  # 4.57 prints this if use_fast is left out
        assert line.startswith("Using a slow image processor as `use_fast` is unset")

    special, images = med.config.text.special, med.encode_image(pixels(photos))
    text, _ = packed(hf, med)
    cosines = med.project_image(images) @ med.project_text(med.encode_text(text)).T
    torch.testing.assert_close(torch.tensor(results["cosines"]), cosines, **CLOSE)
    logits = med.match(text.with_first_token(special.enc), images, torch.arange(3))
    torch.testing.assert_close(torch.tensor(results["logits"]), logits, **CLOSE)
    assert results["temperature"] == med.temperature().item()
    settings = BeamSettings(num_beams=3, **LENGTHS, scoring="huggingface")
    captions = caption_beam(med, images, [special.dec], settings)
    assert [without_ends(ids, special.sep) for ids in results["captions"]] == captions
    published_beam = replace(published("pretrain").beam(), scoring="huggingface")
    captions = caption_beam(med, images, [special.dec], published_beam)
    assert [without_ends(ids, special.sep) for ids in results["as_configured"]] == captions
    assert results["words"] == words("a [X] red")["input_ids"]
    assert results["special"] == "a red"
    answers = []
    for image, question in zip(pixels(photos), TEXTS, strict=True):
        answers.append(answer(hf, med, image, question, settings))
    assert [without_ends(ids, special.sep) for ids in results["answers"]] == answers

    tokenizer = load_tokenizer(TextRecipe(tokenizer=str(hf / "captioning")))
    captions = caption_beam(med, images[:1], [special.dec], published_beam)
    assert results["cards"]["captioning"] == tokenizer.batch_decode(captions)
    assert len(results["cards"]["retrieval"]) == 2
    assert len(results["cards"]["vqa"]) == 1


def test_the_card_says_what_is_known(hf: Path) -> None:
    card = (hf / "captioning" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\ntags: [blip]\npipeline_tag: image-to-")
    assert "2 layers, width 48, 4 heads" in card and "trained for 7 steps" in card
    assert "The checkpoint says nothing of its data" in card
    assert "enc_token_id" in (hf / "retrieval" / "README.md").read_text()
