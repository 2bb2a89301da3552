"""Fine-tuning of the image-grounded decoder for captions, and captions measured.

Legend: B micro-batch of this rank, P predicted tokens, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blip_scale.config.recipe import Recipe
from blip_scale.data.heldout.pairs import HeldoutPairs
from blip_scale.data.loading.micro_batches import Batch
from blip_scale.data.sources.annotations import load_json
from blip_scale.data.tokenizer import prompt_ids
from blip_scale.engine import collectives
from blip_scale.engine.task import Evaluation, Progress
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.evaluation import captions_and_pairs
from blip_scale.evaluation.metrics.captions import CAPTION_METRICS, CaptionScores, caption_scores
from blip_scale.inference.inputs import to_model_input
from blip_scale.model.flops import captioning_flops
from blip_scale.model.med import MED
from blip_scale.model.packing import IGNORED, PackedText
from blip_scale.objectives.language import lm_loss
from blip_scale.tasks.base import TrainingTask

SELECTION = ("bleu_4", "cider")
"""Their sum chooses the checkpoint (published)."""


class CaptioningNetwork(nn.Module):
    """The decoder with its ViT; one forward is one micro-step, without any side effect."""

    def __init__(self, med: MED, prompt_tokens: int, label_smoothing: float) -> None:
        super().__init__()
        self.med = med
        self.prompt_tokens = prompt_tokens
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, text: PackedText) -> dict[str, Tensor]:
        """The loss: next-token prediction of everything but the prompt.

        Args:
            images: [B, 3, H, W] normalised, in the type of the weights.
            text: B captions with the prompt, first token [CLS].
        """
        med = self.med
        text = text.with_first_token(med.config.text.special.dec)
        inputs, targets_P = text.split_targets()
        every = torch.arange(len(images), device=images.device)
        logits_PV = med.decode(inputs, med.encode_image(images), every)
        # Position 0 holds [DEC]; the first `prompt_tokens` positions predict the prompt.
        segments = inputs.segments
        positions_P = segments.positions(segments.sequence_of(len(targets_P)))
        targets_P = targets_P.masked_fill(positions_P < self.prompt_tokens, IGNORED)
        loss = lm_loss(logits_PV, targets_P, self.label_smoothing)
        return {"loss/total": loss, "loss/lm": loss.detach()}


class Captioning(TrainingTask):
    """The captioning task: what `engine.task.Task` asks for."""

    head = "captioning"

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        prompt = prompt_ids(recipe.model.text.prompt, self.tokenizer)
        self._prompt_tokens = len(prompt) - 1

    def build_network(self) -> CaptioningNetwork:
        """The decoder's part of the MED, weights not filled."""
        smoothing = self.recipe.objective.label_smoothing
        return CaptioningNetwork(self.build_med(), self._prompt_tokens, smoothing)

    def inputs(self, batch: Batch, progress: Progress) -> tuple[Any, ...]:
        """Images and captions."""
        self._tokens = len(batch.token_ids)
        return to_model_input(batch, self.device, self.dtype)

    def flops_per_step(self) -> float:
        """Of the micro-batches of one optimizer step on this rank, counted from the last one."""
        return self.accumulation * captioning_flops(self.config, self.batch_size, self._tokens)

    def evaluate(self, engine: ZeroEngine, final: bool) -> Evaluation:
        """Captions of all held-out images; BLEU-4 and CIDEr of the first set give the score."""
        med = self.whole_med(engine)
        found = Evaluation()
        for name, pairs in self.heldout_sets():
            every = range(len(pairs))
            said = captions_and_pairs.captions_of(med, pairs, every, self.recipe, self.tokenizer)
            scores = _scores(said, pairs.captions, SELECTION).values
            shown = captions_and_pairs.shown_images(len(pairs), self.recipe)
            panels, entries = captions_and_pairs.panels_of(
                name, pairs, shown, [said[i] for i in shown]
            )
            found = found.with_set(name, scores, sum(scores.values()), panels, entries)
        return found


def _scores(
    said: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str]
) -> CaptionScores:
    """Measured on rank 0, known on all: Java programs need not run on each."""
    mine = caption_scores(said, references, metrics) if collectives.rank() == 0 else None
    found = collectives.all_gather_objects(mine)[0]
    assert isinstance(found, CaptionScores)
    return found


def figures(
    said: Sequence[str],
    references: Sequence[Sequence[str]],
    annotations: Sequence[Sequence[dict[str, Any]]] = (),
) -> dict[str, Any]:
    """All caption metrics, what was left out and why, and for NoCaps the same of each domain.

    Args:
        said: a caption an image.
        references: of each image.
        annotations: of each image's references; their `domain` counts.

    Raises:
        ValueError: images without references.
    """
    without = sum(not own for own in references)
    if without:
        raise ValueError(f"{without} of {len(references)} images have no reference caption")
    scores = _scores(said, references, CAPTION_METRICS)
    found: dict[str, Any] = dict(scores.values)
    domains = [own[0].get("domain") if own else None for own in annotations]
    for domain in sorted({name for name in domains if name}):
        mine = [i for i, name in enumerate(domains) if name == domain]
        part = _scores([said[i] for i in mine], [references[i] for i in mine], CAPTION_METRICS)
        found |= {f"{domain}/{name}": value for name, value in part.values.items()}
    return found | {f"without {name}": reason for name, reason in scores.left_out.items()}


def image_ids(pairs: HeldoutPairs, location: str, strip_prefix: str = "") -> list[int | str]:
    """The ids that COCO and NoCaps know the images by: those of the annotation file at `location`,
    else the digits that end the file name (COCO_val2014_000000391895.jpg), else the record's id."""
    known: dict[str, int | str] = {}
    items = load_json(location) if location.endswith(".json") else []
    for item in items if isinstance(items, list) else []:
        if "img_id" in item:
            known[item["image"].removeprefix(strip_prefix)] = item["img_id"]
    images = items.get("images", []) if isinstance(items, dict) else []
    for image in images:  # a test set without captions: nocaps_test_image_info.json
        if "file_name" in image and "id" in image:
            known[image["file_name"]] = image["id"]
    found: list[int | str] = []
    for name, own in zip(pairs.ids, pairs.annotations, strict=True):
        digits = re.search(r"(?:^|[_/])(\d{6,})\.\w+$", name)
        by_name = int(digits[1]) if digits else name
        annotated = own[0].get("id") if own else None
        found.append(known.get(name, by_name if annotated is None else annotated))
    return found


def references_of(location: str, ids: Sequence[int | str]) -> list[list[str]]:
    """Captions of some images out of COCO's own annotations, as they are written there.

    Raises:
        ValueError: not such a file, or it lacks some of the images.
    """
    annotations = load_json(location)
    if not isinstance(annotations, dict) or "annotations" not in annotations:
        raise ValueError(f"{location} holds no COCO annotations ({{images, annotations}})")
    captions: dict[int | str, list[str]] = {}
    for one in annotations["annotations"]:
        captions.setdefault(one["image_id"], []).append(one["caption"])
    absent = [name for name in ids if name not in captions]
    if absent:
        raise ValueError(
            f"{location} has no captions of {len(absent)} of {len(ids)} images, the first "
            f"{absent[0]}: it is of another set"
        )
    return [captions[name] for name in ids]
