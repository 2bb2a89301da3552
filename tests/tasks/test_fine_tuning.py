"""Fine-tuning runs on one and several ranks: losses, checkpoints, and exports."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_blip
import tiny_runs
import torch
from safetensors.torch import load_file
from torch import Tensor

from blip_scale import launcher
from blip_scale.commands import convert_checkpoint
from blip_scale.config import recipe as recipes
from blip_scale.config.recipe import ObjectiveRecipe, Recipe
from blip_scale.data.heldout.pairs import heldout_pairs
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.evaluation import captions_and_pairs, retrieval
from blip_scale.inference.inputs import to_pixels
from blip_scale.inference.loading import load_blip
from blip_scale.inference.sizes import med_config
from blip_scale.interop.checkpoints import head_parameters, load_checkpoint
from blip_scale.interop.training_checkpoints import write_training_checkpoint
from blip_scale.model.heads import Head, cut_down
from blip_scale.model.med import MED, MomentumEncoder
from blip_scale.model.packing import PackedText
from blip_scale.objectives.contrastive import FeaturePair
from blip_scale.objectives.matching import draw_negatives
from blip_scale.tasks.captioning import CaptioningNetwork
from blip_scale.tasks.momentum_contrast import MomentumContrastNetwork, MomentumInputs
from blip_scale.tasks.retrieval import RetrievalNetwork

REPO = Path(__file__).resolve().parent.parent.parent
STEPS = 8
FILE = "rank_00000.safetensors"


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of pretraining for the network of the tiny runs, with weights far from zero."""
    folder = tmp_path_factory.mktemp("pretrained")
    recipe = recipes.load(str(tiny_runs.make_recipe(folder)))
    config = med_config(recipe, load_tokenizer(recipe.model.text))
    weights = tiny_blip.pretrained(config)
    (folder / "step_00000007").mkdir()
    write_training_checkpoint(weights, folder / "step_00000007")
    return folder / "step_00000007"


def recipe_of(folder: Path, task: str, pretrained: Path, **changes: Any) -> Path:
    """Recipe of the tiny run, for fine-tuning."""
    prompt = "a big " if task == "captioning" else ""
    return tiny_runs.make_recipe(
        folder,
        task=task,
        model={"checkpoint": str(pretrained), "text": {"prompt": prompt, "dropout": 0.1}},
        objective={"itm": "global", "alpha_ramp_epochs": 1.0},
        optimizer={"schedule": "cosine", "peak_lr": 1e-3, "min_lr": 0.0},
        train={"max_steps": STEPS, "epochs": 2},
        checkpoint={"every_steps": 4},
        evaluation={"every_steps": "epoch", "batch_size": 8},
        **changes,
    )


def texts(pretrained: Path, captions: list[str], recipe: Recipe) -> list[list[int]]:
    tokenizer = load_tokenizer(recipe.model.text)
    return [tokenizer(caption)["input_ids"] for caption in captions]


@pytest.fixture(scope="session")
def tiny(pretrained: Path) -> Recipe:
    return recipes.load(str(pretrained.parent / "recipe.yaml"))


def network_of(pretrained: Path, recipe: Recipe, head: Head) -> MED:
    """The part of the MED that a head trains, in evaluation mode."""
    config = med_config(recipe, load_tokenizer(recipe.model.text))
    med = cut_down(MED(config), head)
    state = head_parameters(pretrained, head, config)
    assert {f"med.{name}" for name, _ in med.named_parameters()} == set(state)
    med.load_state_dict({name.removeprefix("med."): t for name, t in state.items()}, strict=False)
    return med.eval()


def test_the_captioning_loss_is_that_of_transformers(
    pretrained: Path, tiny: Recipe, tmp_path: Path
) -> None:
    """The loss is label-smoothed and leaves the prompt out."""
    from transformers import BlipForConditionalGeneration

    vocabulary = ["--tokenizer", str(pretrained.parent / "vocabulary")]
    out = tmp_path / "captioner"
    assert convert_checkpoint.main([str(pretrained), str(out), *vocabulary]) == 0
    reference = BlipForConditionalGeneration.from_pretrained(out)
    reference.text_decoder.label_smoothing = 0.1
    captions = ["a big red disc on grey", "a big blue bar", "a big green cross and a white square"]
    rows = texts(pretrained, captions, tiny)
    med = network_of(pretrained, tiny, "captioning")
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ours = CaptioningNetwork(med, 2, 0.1)(images, PackedText.from_lists(rows))
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    ids[:, 0] = med.config.text.special.dec
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100  # [DEC] and the prompt
    expected = reference(pixel_values=images, input_ids=ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(ours["loss/total"], expected.loss, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_retrieval_loss_written_out(pretrained: Path, tiny: Recipe) -> None:
    """The expected loss takes features and logits of the whole MED, and targets one by one."""
    config = med_config(tiny, load_tokenizer(tiny.model.text))
    whole = MED(config)
    load_checkpoint(whole.eval(), pretrained)
    momentum = MomentumEncoder(config).eval()
    tiny_blip.randomized(momentum, 3)
    med = network_of(pretrained, tiny, "retrieval")
    contrast = MomentumContrastNetwork(momentum)
    network = RetrievalNetwork(med, contrast, ObjectiveRecipe()).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    captions = ["a red disc", "a big blue bar", "a red disc on grey", "a small cross"]
    text = PackedText.from_lists(texts(pretrained, captions, tiny))
    ids = torch.tensor([5, 6, 5, 7])
    queue = torch.nn.functional.normalize(torch.randn(2, 16, 3, generator=generator), dim=1)
    queue_ids = torch.tensor([6, -100, 5])
    weights = torch.tensor([0.4, 0.6], dtype=torch.float64)
    inputs = MomentumInputs(FeaturePair(queue[0], queue[1]), weights, queue_ids)
    outputs = network(images, text, inputs, torch.Generator().manual_seed(9), ids)

    embeds = whole.encode_image(images)
    online = [whole.project_image(embeds), whole.project_text(whole.encode_text(text))]
    keys = [
        momentum.project_image(momentum.encode_image(images)),
        momentum.project_text(momentum.encode_text(text)),
    ]
    temperature = whole.temperature()
    itc = 0.0
    for query, key in ((0, 1), (1, 0)):
        pool = torch.cat([keys[key], queue[key].T])
        right = (ids[:, None] == torch.cat([ids, queue_ids])).float()
        soft = (keys[query] @ pool.T / temperature).softmax(1)
        target = 0.4 * soft + 0.6 * right / right.sum(1, keepdim=True)
        logs = (online[query] @ pool.T / temperature).log_softmax(1)
        itc -= (target * logs).sum(1).mean().item() / 2
    assert outputs["loss/itc"].item() == pytest.approx(itc, rel=1e-4)

    same = ids[:, None] == ids
    negatives = draw_negatives(
        online[1] @ online[0].T / temperature,
        online[0] @ online[1].T / temperature,
        torch.Generator().manual_seed(9),
        same_image_BP=same,
    )
    enc = text.with_first_token(config.text.special.enc)
    every = torch.arange(4)
    logits = torch.cat(
        [
            whole.match(enc, embeds, every),
            whole.match(enc, embeds, negatives.image),
            whole.match(enc.select(negatives.text), embeds, every),
        ]
    )
    itm = torch.nn.functional.cross_entropy(logits, torch.tensor([1] * 4 + [0] * 8))
    torch.testing.assert_close(outputs["loss/itm"], itm, rtol=1e-4, atol=1e-5)


def rank(arguments: list[str], folder: Path, number: int, ranks: int, port: int) -> tiny_runs.Rank:
    """Start tools/evaluate.py as one of several ranks."""
    environment = os.environ | {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    command = [str(REPO / "tools" / "evaluate.py"), *arguments]
    with (folder / f"evaluate_{number}.txt").open("w") as output:
        return tiny_runs.fork_server().start(command, environment, REPO, output)


def evaluated(arguments: list[str], folder: Path, ranks: int = 1) -> dict[str, Any]:
    """The report of an evaluation."""
    report = folder / "report.json"
    arguments = [*arguments, "--json", str(report), "--overwrite"]
    port = launcher.free_port()
    codes = tiny_runs.finish([rank(arguments, folder, r, ranks, port) for r in range(ranks)])
    assert codes == [0] * ranks, (folder / "evaluate_0.txt").read_text()
    result: dict[str, Any] = json.loads(report.read_text())
    return result


def weights(folder: Path) -> dict[str, Tensor]:
    return tiny_runs.whole_tensors(folder / f"step_{STEPS:08d}", "weight")


@pytest.mark.multiprocess
@pytest.mark.parametrize("task", ["captioning", "retrieval"])
def test_a_run_resumes_and_is_exported(pretrained: Path, tmp_path: Path, task: str) -> None:
    """A run on two ranks of ZeRO-3 that is killed half-way ends with equal bits.

    Its head is exported, and evaluates equally on one rank and on two.
    """
    recipe = recipe_of(tmp_path / "a", task, pretrained)
    tiny_runs.train(recipe, 2)
    run = tmp_path / "a" / "run"
    summary = json.loads((run / "summary.json").read_text())
    best = summary["best"]
    assert best["step"] in (4, 8)
    assert (run / "checkpoints" / f"step_{best['step']:08d}").is_dir()

    half = tmp_path / "b"
    again = recipe_of(half, task, pretrained)
    shutil.copytree(run / "checkpoints" / "step_00000004", half / "run/checkpoints/step_00000004")
    tiny_runs.train(again, 2)
    ends = [weights(folder / "checkpoints") for folder in (run, half / "run")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    shared = [
        load_file(folder / f"checkpoints/step_{STEPS:08d}/shared.safetensors")
        for folder in (run, half / "run")
    ]
    assert all(torch.equal(shared[0][name], shared[1][name]) for name in shared[0])
    assert ("queue/image_ids" in shared[0]) == (task == "retrieval")

    out = tmp_path / "exported"
    assert convert_checkpoint.main([str(run), str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    names = {"captioning": "ConditionalGeneration", "retrieval": "ImageTextRetrieval"}
    assert config["architectures"] == [f"BlipFor{names[task]}"]
    heldout = str(tmp_path / "a" / "heldout")
    settings = ["evaluation.max_caption_tokens=8", "evaluation.rerank_top_k=4"]
    prompt = 'model.text.prompt="a big "'
    first = evaluated([task, str(run), heldout], tmp_path, 2)["figures"]
    other = evaluated([task, str(out), heldout, *settings, prompt], tmp_path)["figures"]
    assert first == other
    prefix = "heldout/"
    at_the_end = {
        name.removeprefix(prefix): value
        for name, value in summary["evaluation"].items()
        if name.startswith(prefix)
    }
    assert {name: first[name] for name in at_the_end} == pytest.approx(at_the_end)
    assert len(at_the_end) >= 2


@pytest.fixture(scope="session")
def exported(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `captioning` and `retrieval` for transformers."""
    out = tmp_path_factory.mktemp("exported") / "hf"
    vocabulary = ["--tokenizer", str(pretrained.parent / "vocabulary"), "--head", "all"]
    assert convert_checkpoint.main([str(pretrained), str(out), *vocabulary]) == 0
    return out


@torch.no_grad()
def test_scores_of_an_exported_folder_are_those_of_transformers(
    exported: Path, pretrained: Path, tiny: Recipe
) -> None:
    """Cosines of all pairs are equal, and so are raw match logits plus cosines if re-ranked."""
    from transformers import BlipForImageTextRetrieval, BlipProcessor

    folder = exported / "retrieval"
    blip = load_blip(folder)
    pairs = heldout_pairs(tiny.data.heldout[0], blip.image_size)
    cosines, reranked = captions_and_pairs.scores_on(blip.med, pairs, tiny, blip.tokenizer, True)
    assert reranked is not None
    model = BlipForImageTextRetrieval.from_pretrained(folder)
    processor = BlipProcessor.from_pretrained(folder)
    raw = [caption for texts_of_image in pairs.captions for caption in texts_of_image]
    inputs = processor(
        list(pairs.images(range(len(pairs)))), raw, padding=True, return_tensors="pt"
    )
    expected = model(**inputs, use_itm_head=False).itm_score
    torch.testing.assert_close(cosines, expected, rtol=1e-5, atol=1e-5)
    inputs["input_ids"][:, 0] = model.config.text_config.enc_token_id
    expected = model(**inputs).itm_score[:, 1] + expected.diagonal()  # of each image and its text
    scores = reranked[0].diagonal()
    seen = scores != retrieval.NOT_RERANKED
    assert 3 < seen.sum() < len(scores)
    torch.testing.assert_close(scores[seen], expected[seen], rtol=1e-5, atol=1e-5)


def test_captions_of_an_exported_folder_are_those_of_transformers(
    exported: Path, tiny: Recipe
) -> None:
    """Captions are equal token by token, after a prompt and with a repetition penalty."""
    from transformers import BlipForConditionalGeneration

    folder = exported / "captioning"
    blip = load_blip(folder)
    text = replace(tiny.model.text, prompt="a big ")
    evaluation = replace(
        tiny.evaluation, max_caption_tokens=9, repetition_penalty=1.3, scoring="huggingface"
    )
    recipe = replace(tiny, model=replace(tiny.model, text=text), evaluation=evaluation)
    pairs = heldout_pairs(tiny.data.heldout[0], blip.image_size)
    ours = captions_and_pairs.captions_of(
        blip.med, pairs, range(len(pairs)), recipe, blip.tokenizer
    )
    model = BlipForConditionalGeneration.from_pretrained(folder)
    images = to_pixels(pairs.images(range(len(pairs))), blip.med)
    prompt = torch.tensor([blip.tokenizer("a big ")["input_ids"]] * len(pairs))
    generated = model.generate(
        images, prompt, num_beams=3, max_length=9, min_length=5, repetition_penalty=1.3,
        do_sample=False,
    )  # fmt: skip
    expected = blip.tokenizer.batch_decode(generated[:, 3:], skip_special_tokens=True)
    assert ours == expected
    assert len(set(expected)) > 3
