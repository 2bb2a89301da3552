"""A tiny BLIP with random weights, and its checkpoint in our format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tiny_runs
import torch
from torch import Tensor
from transformers import BertTokenizerFast

from blip_scale.config import recipe as recipes
from blip_scale.config.model_recipe import ModelRecipe, TextRecipe, VisionRecipe
from blip_scale.config.recipe import EvaluationRecipe, Recipe
from blip_scale.data.tokenizer import load_tokenizer, special_ids
from blip_scale.interop.blip_weights import BlipWeights
from blip_scale.interop.salesforce import from_salesforce, momentum_to_salesforce, to_salesforce
from blip_scale.interop.training_checkpoints import write_training_checkpoint
from blip_scale.model.med import MED, MEDConfig, MomentumEncoder
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.vision import VisionConfig
from blip_scale.storage import run_folder

Convert = Callable[..., Path]
QUEUE = 12
STEP = 7
PROMPT = "a big "
EVALUATION = EvaluationRecipe(
    num_beams=4, max_caption_tokens=9, min_caption_tokens=7, repetition_penalty=1.2, rerank_top_k=3
)
"""Nobody's defaults."""
SIZES = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def vocabulary(folder: Path) -> Path:
    """A folder with a tokenizer of the tiny runs' words."""
    folder.mkdir(parents=True)
    words = [*tiny_runs.WORDS, *tiny_runs.COLOURS, *tiny_runs.SHAPES]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder


def config(tokenizer: Path, vision: VisionConfig | None = None, heads: int = 4) -> MEDConfig:
    """Heads of 12 channels: no default of anybody's."""
    loaded = load_tokenizer(TextRecipe(tokenizer=str(tokenizer)))
    special = SpecialTokens(**special_ids(loaded))
    text = TextConfig(special, len(loaded), 48, 2, heads, 96, 32)
    return MEDConfig(vision or VisionConfig("vit_tiny_patch16_224", 32, dict(SIZES)), text, 16)


def randomized(module: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    """Its parameters by name, filled so that pictures and texts matter to the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
            norm = "norm" in name and name.endswith("weight")
            parameter.copy_(drawn + 1 if norm else drawn)
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def pretrained(sizes: MEDConfig) -> BlipWeights:
    """All of a pretraining: weights, momentum copies, queues."""
    med = MED(sizes)
    online = randomized(med, 0)
    med.temperature.value.data.fill_(0.0519)
    state = to_salesforce(online, "pretrain")
    state |= momentum_to_salesforce(randomized(MomentumEncoder(sizes), 1), state)
    for number, kind in enumerate(("image", "text")):
        generator = torch.Generator().manual_seed(number)
        state[f"{kind}_queue"] = torch.randn(sizes.embed_dim, QUEUE, generator=generator)
    state["queue_ptr"] = torch.tensor([5])
    return BlipWeights("pretrain", sizes, state, "random weights", STEP)


def write_ours(folder: Path, sizes: MEDConfig, tokenizer: Path) -> Path:
    """A checkpoint of step 7 with its tokenizer."""
    folder.mkdir(parents=True)
    write_training_checkpoint(pretrained(sizes), folder)
    load_tokenizer(TextRecipe(tokenizer=str(tokenizer))).save_pretrained(folder / "tokenizer")
    return folder


def wide(vocabulary: Path) -> MEDConfig:
    """The tiny network with the positions that recipes without a text checkpoint have."""
    sizes = config(vocabulary)
    return replace(sizes, text=replace(sizes.text, max_positions=512))


def make_run(
    folder: Path, vocabulary: Path, prompt: str = PROMPT, evaluation: EvaluationRecipe = EVALUATION
) -> Path:
    """The folder of a run that wrote one checkpoint."""
    step = folder / run_folder.CHECKPOINTS / run_folder.step_folder(STEP)
    write_ours(step, wide(vocabulary), vocabulary)
    for name in ("network.json", "output_settings.json"):  # runs do not write it
        (step / name).unlink()
    text = TextRecipe(None, str(vocabulary), 2, 48, 4, 96, max_tokens=8, prompt=prompt)
    vision = VisionRecipe("vit_tiny_patch16_224", 32, dict(SIZES))
    recipe = Recipe(model=ModelRecipe(vision, text, embed_dim=16), evaluation=evaluation)
    (folder / run_folder.RECIPE).write_text(recipes.to_yaml(recipe))
    return folder


def med_of(weights: BlipWeights) -> MED:
    """A MED in eval mode with all of these weights."""
    med = MED(weights.config)
    state = from_salesforce(weights.state, dict(med.named_parameters()))
    med.load_state_dict(state | {"lm_head.weight": state["text.embeddings.word.weight"]})
    return med.eval()
