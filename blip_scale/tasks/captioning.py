"""Fine-tuning of the image-grounded decoder for captioning, and caption metrics.

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
from blip_scale.data.sources.annotations import IMAGE_KEYS, load_json
from blip_scale.data.sources.metadata import first_of
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
"""Metrics whose sum selects the best checkpoint (published)."""


class CaptioningNetwork(nn.Module):
    """The decoder with its ViT. A forward is one micro-step, without side effects."""

    def __init__(self, med: MED, prompt_tokens: int, label_smoothing: float) -> None:
        super().__init__()
        self.med = med
        self.prompt_tokens = prompt_tokens
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, text: PackedText) -> dict[str, Tensor]:
        """Compute the next-token loss on all tokens except the prompt's.

        Args:
            images: [B, 3, H, W] normalised, in the dtype of the weights.
            text: B captions that begin with the prompt. The first token is [CLS].
        """
        med = self.med
        text = text.with_first_token(med.config.text.special.dec)
        inputs, targets_P = text.split_targets()
        every = torch.arange(len(images), device=images.device)
        logits_PV = med.decode(inputs, med.encode_image(images), every)
        # Position 0 holds [DEC]. The first `prompt_tokens` positions predict the prompt.
        segments = inputs.segments
        positions_P = segments.positions(segments.sequence_of(len(targets_P)))
        targets_P = targets_P.masked_fill(positions_P < self.prompt_tokens, IGNORED)
        loss = lm_loss(logits_PV, targets_P, self.label_smoothing)
        return {"loss/total": loss, "loss/lm": loss.detach()}


class Captioning(TrainingTask):
    """The captioning task; implements `engine.task.Task`."""

    head = "captioning"

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        prompt = prompt_ids(recipe.model.text.prompt, self.tokenizer)
        self._prompt_tokens = len(prompt) - 1

    def build_network(self) -> CaptioningNetwork:
        """Build the ViT and decoder of the MED, with unset weights."""
        smoothing = self.recipe.objective.label_smoothing
        return CaptioningNetwork(self.build_med(), self._prompt_tokens, smoothing)

    def inputs(self, batch: Batch, progress: Progress) -> tuple[Any, ...]:
        """Return images and captions."""
        self._tokens = len(batch.token_ids)
        return to_model_input(batch, self.device, self.dtype)

    def flops_per_step(self) -> float:
        """Estimate the FLOPs of one optimizer step on this rank from the last micro-batch."""
        return self.accumulation * captioning_flops(self.config, self.batch_size, self._tokens)

    def evaluate(self, engine: ZeroEngine, final: bool) -> Evaluation:
        """Caption all held-out images. The score is BLEU-4 plus CIDEr on the first set."""
        med = self.whole_med(engine)
        evaluation = Evaluation()
        for name, pairs in self.heldout_sets():
            every = range(len(pairs))
            captions = captions_and_pairs.captions_of(
                med, pairs, every, self.recipe, self.tokenizer
            )
            scores = _scores(captions, pairs.captions, SELECTION).values
            shown = captions_and_pairs.shown_images(len(pairs), self.recipe)
            panels, entries = captions_and_pairs.panels_of(
                name, pairs, shown, [captions[i] for i in shown]
            )
            evaluation = evaluation.with_set(name, scores, sum(scores.values()), panels, entries)
        return evaluation


def _scores(
    captions: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str]
) -> CaptionScores:
    """Return scores on all ranks. Only rank 0 computes them, because metrics start Java."""
    local = caption_scores(captions, references, metrics) if collectives.rank() == 0 else None
    scores = collectives.all_gather_objects(local)[0]
    assert isinstance(scores, CaptionScores)
    return scores


def figures(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    annotations: Sequence[Sequence[dict[str, Any]]] = (),
) -> dict[str, Any]:
    """Compute all caption metrics, also by domain for NoCaps. List reasons for missing metrics.

    Args:
        captions: one caption for each image.
        references: reference captions of each image.
        annotations: annotations of each image's references. The first one gives the `domain`.

    Raises:
        ValueError: some images have no references.
    """
    without = sum(not texts for texts in references)
    if without:
        raise ValueError(f"{without} of {len(references)} images have no reference caption")
    scores = _scores(captions, references, CAPTION_METRICS)
    metrics: dict[str, Any] = dict(scores.values)
    domains = [notes[0].get("domain") if notes else None for notes in annotations]
    for domain in sorted({name for name in domains if name}):
        images = [i for i, name in enumerate(domains) if name == domain]
        of_domain = _scores(
            [captions[i] for i in images], [references[i] for i in images], CAPTION_METRICS
        )
        metrics |= {f"{domain}/{name}": value for name, value in of_domain.values.items()}
    return metrics | {f"without {name}": reason for name, reason in scores.left_out.items()}


def image_ids(pairs: HeldoutPairs, location: str, strip_prefix: str = "") -> list[int | str]:
    """Find the COCO or NoCaps ids of the images.

    An id comes from the annotation file at `location`, else from the record, else from the digits
    at the end of the file name (COCO_val2014_000000391895.jpg).
    """
    ids_of_files: dict[str, int | str] = {}
    items = load_json(location) if location.endswith((".json", ".json.gz")) else []
    for item in items if isinstance(items, list) else []:
        path = first_of(item, IMAGE_KEYS)
        if "img_id" in item and isinstance(path, str):
            name = path.removeprefix(strip_prefix).removeprefix("./")
            ids_of_files[name] = item["img_id"]
    images = items.get("images", []) if isinstance(items, dict) else []
    for image in images:  # a test set without captions: nocaps_test_image_info.json
        if "file_name" in image and "id" in image:
            ids_of_files[image["file_name"]] = image["id"]
    ids: list[int | str] = []
    for name, notes in zip(pairs.ids, pairs.annotations, strict=True):
        digits = re.search(r"(?:^|[_/])(\d{6,})\.\w+$", name)
        by_name = int(digits[1]) if digits else name
        annotated = notes[0].get("id") if notes else None
        ids.append(ids_of_files.get(name, by_name if annotated is None else annotated))
    return ids


def references_of(location: str, ids: Sequence[int | str]) -> list[list[str]]:
    """Read the captions of some images from a COCO annotation file, unchanged.

    Raises:
        ValueError: the file is not a COCO annotation file, or it lacks some of the images.
    """
    annotations = load_json(location)
    if not isinstance(annotations, dict) or "annotations" not in annotations:
        raise ValueError(f"{location} holds no COCO annotations ({{images, annotations}})")
    captions: dict[int | str, list[str]] = {}
    for annotation in annotations["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    absent = [name for name in ids if name not in captions]
    if absent:
        raise ValueError(
            f"{location} has no captions of {len(absent)} of {len(ids)} images, the first "
            f"{absent[0]}: it is of another set"
        )
    return [captions[name] for name in ids]
