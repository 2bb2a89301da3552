"""Evaluation on held-out pairs from end to end, in one process."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
import torch
from fake_ranks import FakeRanks

from blip_scale.config.recipe import Recipe, StreamRecipe
from blip_scale.data.heldout.pairs import heldout_pairs
from blip_scale.data.pixels.transforms import normalize_images
from blip_scale.data.shards import write_shards
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.engine.task import Evaluation
from blip_scale.evaluation import captions_and_pairs, retrieval
from blip_scale.inference.sizes import med_config
from blip_scale.model.generation import BeamSettings, caption_beam
from blip_scale.model.med import MED
from blip_scale.model.packing import PackedText
from blip_scale.tasks import networks

OTHERS = 5
"""Pairs in the second held-out set; the first has 16."""
SETS = ("heldout", "others")
COUNTS = ("candidates", "texts")


@pytest.fixture(scope="module")
def med(recipe: Recipe) -> MED:
    """A MED whose weights give distinct features of images and texts."""
    config = med_config(recipe, load_tokenizer(recipe.model.text))
    med = networks.initialized_med(recipe, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in med.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return med.eval()


def evaluate(med: MED, recipe: Recipe, final: bool = True) -> Evaluation:
    return captions_and_pairs.evaluate(med, recipe, load_tokenizer(recipe.model.text), final)


def test_every_set_has_its_figures(med: MED, recipe: Recipe) -> None:
    scalars = evaluate(med, recipe).scalars
    directions = itertools.product(("itc", "itm"), ("image_to_text", "text_to_image"))
    recalls = [f"{kind}_{direction}_r{k}" for kind, direction in directions for k in (1, 5, 10)]
    names = {f"{name}/{figure}" for name in SETS for figure in [*recalls, *COUNTS]}
    assert set(scalars) == names | {"heldout/exact", "others/exact"}
    assert [scalars[f"heldout/{count}"] for count in COUNTS] == [16, 16]
    assert [scalars[f"others/{count}"] for count in COUNTS] == [OTHERS, OTHERS]
    during = evaluate(med, recipe, final=False)
    assert set(during.scalars) == {name for name in names if "/itm_" not in name}


@torch.no_grad()
def test_figures_are_those_of_the_pairs(med: MED, recipe: Recipe) -> None:
    """Recalls equal those computed by hand in one batch: normalised pixels, cosine, recalls."""
    tokenizer = load_tokenizer(recipe.model.text)
    pairs = heldout_pairs(recipe.data.heldout[0], recipe.model.vision.image_size)
    images = normalize_images(pairs.images(range(16)), torch.float32)
    texts = PackedText.from_lists(
        [tokenizer(caption)["input_ids"] for (caption,) in pairs.captions]
    )
    cosine = (
        med.project_image(med.encode_image(images)) @ med.project_text(med.encode_text(texts)).T
    )
    scalars = evaluate(med, recipe, final=False).scalars
    for name, value in retrieval.recalls(cosine, torch.arange(16)).items():
        assert scalars[f"heldout/itc_{name}"] == value, name


def test_more_ranks_than_pairs(med: MED, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks without an image or a text take part; figures and captions are those of one rank."""
    recipe = replace(recipe, data=replace(recipe.data, heldout=recipe.data.heldout[1:]))
    alone = evaluate(med, recipe)
    for evaluation in FakeRanks(OTHERS + 3, monkeypatch).run(lambda _: evaluate(med, recipe)):
        assert evaluation.scalars == pytest.approx(alone.scalars)


@torch.no_grad()
def test_all_texts_of_an_image_count(
    med: MED, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recalls of images with one to three captions equal those by sorting, also on two ranks."""
    several = []
    for number, record in enumerate(tiny_runs.records("others")[:9]):
        texts = [f"{record.caption} {'again ' * n}{number}" for n in range(1 + number % 3)]
        several.append(replace(record, caption=texts))
    write_shards(tmp_path / "several", several)
    stream = StreamRecipe("several", str(tmp_path / "several"))
    recipe = replace(recipe, data=replace(recipe.data, heldout=[stream]))

    pairs = heldout_pairs(stream, recipe.model.vision.image_size)
    tokenizer = load_tokenizer(recipe.model.text)
    images = normalize_images(pairs.images(range(9)), torch.float32)
    tokens = [tokenizer(text)["input_ids"] for captions in pairs.captions for text in captions]
    owners = [image for image, captions in enumerate(pairs.captions) for _ in captions]
    cosine = (
        med.project_image(med.encode_image(images))
        @ med.project_text(med.encode_text(PackedText.from_lists(tokens))).T
    )
    scalars = evaluate(med, recipe).scalars
    assert (scalars["several/candidates"], scalars["several/texts"]) == (9, 18)
    for k in (1, 5, 10):
        best = [row.argsort(descending=True)[:k].tolist() for row in cosine]
        hits = [any(owners[text] == image for text in row) for image, row in enumerate(best)]
        assert scalars[f"several/itc_image_to_text_r{k}"] == pytest.approx(sum(hits) / 9)
        best = [column.argsort(descending=True)[:k].tolist() for column in cosine.T]
        hits = [owners[text] in images_of_text for text, images_of_text in enumerate(best)]
        assert scalars[f"several/itc_text_to_image_r{k}"] == pytest.approx(sum(hits) / 18)
    for evaluation in FakeRanks(2, monkeypatch).run(lambda rank: evaluate(med, recipe)):
        assert evaluation.scalars == scalars


def test_captions_and_pictures_keep_step_with_the_pairs(med: MED, recipe: Recipe) -> None:
    """Three of 16 and three of 5 images are shown, spread over the sets, with their captions."""
    evaluation = evaluate(med, recipe, final=False)
    assert list(evaluation.panels) == ["heldout", "others"]
    tokenizer = load_tokenizer(recipe.model.text)
    beam = BeamSettings(num_beams=3, max_length=8, min_length=5)
    entries = iter(evaluation.captions)
    for stream, places in zip(recipe.data.heldout, ([0, 5, 10], [0, 1, 3]), strict=True):
        pairs = heldout_pairs(stream, recipe.model.vision.image_size)
        assert len(evaluation.panels[stream.name]) == 3
        for place, panel in zip(places, evaluation.panels[stream.name], strict=True):
            image = pairs.images([place])
            assert torch.equal(panel.image, image[0])
            assert panel.truth == pairs.captions[place][0]
            with torch.no_grad():
                embeds = med.encode_image(normalize_images(image, torch.float32))
            sequence = caption_beam(med, embeds, [med.config.text.special.dec], beam)[0]
            assert panel.caption == tokenizer.decode(sequence, skip_special_tokens=True)
            assert next(entries) == {
                "set": stream.name, "id": pairs.ids[place],
                "caption": panel.caption, "truth": panel.truth,
            }  # fmt: skip
    assert len({entry["caption"] for entry in evaluation.captions}) > 1


def test_ranks_share_the_work_and_agree(
    med: MED, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank has the figures of a single rank, though the ranks do not divide the sets."""
    alone = evaluate(med, recipe)
    for evaluation in FakeRanks(3, monkeypatch).run(lambda rank: evaluate(med, recipe)):
        assert evaluation.scalars == alone.scalars
        assert evaluation.captions == alone.captions


def test_the_summary_counts_right_captions_and_shows_the_surest_first(
    med: MED, recipe: Recipe
) -> None:
    evaluation = evaluate(med, recipe)
    for name in ("heldout", "others"):
        entries = [entry for entry in evaluation.captions if entry["set"] == name]
        matches = [entry["match"] for entry in entries]
        assert all(entry["exact"] is (entry["caption"] == entry["truth"]) for entry in entries)
        assert matches == sorted(matches, reverse=True) and 0 < matches[-1] < matches[0] < 1
        shown = [(panel.caption, panel.truth) for panel in evaluation.panels[name]]
        assert shown == [(entry["caption"], entry["truth"]) for entry in entries]
    tokenizer = load_tokenizer(recipe.model.text)
    references = [["a red dog", "a cat"], ["a dog"], ["a cat"]]
    written = ["a cat", "A dog", "a red cat"]
    right = captions_and_pairs.exactly_right(written, references, tokenizer)
    assert right == [True, True, False]


def test_limits_of_the_recipe(med: MED, recipe: Recipe) -> None:
    few = replace(recipe.evaluation, max_pairs=3, captions=0, rerank_top_k=100)
    evaluation = evaluate(med, replace(recipe, evaluation=few))
    assert evaluation.scalars["heldout/candidates"] == 3
    assert evaluation.captions == []
    none = evaluate(med, replace(recipe, data=replace(recipe.data, heldout=[])))
    assert none == Evaluation()
