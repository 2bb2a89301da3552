"""Fine-tuning on NLVR2: is a sentence true of a pair of images?

Legend: B pairs of images, each with a sentence.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from blip_scale.config.recipe import Recipe
from blip_scale.data.heldout.pairs import HeldoutPairs
from blip_scale.data.loading.micro_batches import Batch, CaptionInput
from blip_scale.data.tokenizer import pack_captions
from blip_scale.engine import collectives
from blip_scale.engine.task import Evaluation, Progress
from blip_scale.engine.transfers import to_device
from blip_scale.engine.watching.pictures import Panel
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.errors import RefusedInput
from blip_scale.evaluation import captions_and_pairs
from blip_scale.inference.inputs import packed_text, to_model_input, to_pixels
from blip_scale.model.flops import TextWork, fine_tuning_flops
from blip_scale.model.nlvr2 import NLVR2
from blip_scale.model.packing import PackedText
from blip_scale.tasks import networks
from blip_scale.tasks.base import TrainingTask

MAX_WORDS = 40
"""Maximum number of words of a sentence (published)."""


class NLVR2Network(nn.Module):
    """The NLVR2 network and its loss. A forward is one micro-step, without side effects."""

    def __init__(self, med: NLVR2) -> None:
        super().__init__()
        self.med = med

    def forward(self, images: Tensor, sentences: PackedText, labels: Tensor) -> dict[str, Tensor]:
        """Compute the cross entropy of the labels.

        Args:
            images: [2B, 3, H, W] normalised. All first images precede all second ones.
            sentences: B texts. The first token is [CLS].
            labels: [B] int64, 1 if the sentence is true.
        """
        enc = self.med.config.text.special.enc
        logits = self.med(images, sentences.with_first_token(enc)).float()
        loss = F.cross_entropy(logits, labels)
        right = (logits.detach().argmax(-1) == labels).float().mean()
        return {"loss/total": loss, "nlvr2/accuracy": right}


class ImagePairs(TrainingTask):
    """The NLVR2 task; implements `engine.task.Task`."""

    head = "nlvr2"

    def text_input(self) -> CaptionInput:
        """Return the settings that turn sentences into tokens."""
        text = self.recipe.model.text
        return CaptionInput(self.tokenizer, text.max_tokens, text.max_words or MAX_WORDS)

    def build_network(self) -> NLVR2Network:
        """Build the encoder of sentences and pairs, with unset weights."""
        return NLVR2Network(self.limited(NLVR2(self.config)))

    def inputs(self, batch: Batch, progress: Progress) -> tuple[Any, ...]:
        """Return image pairs, sentences and labels.

        Raises:
            RefusedInput: a sample is not a pair of images with a label.
        """
        has_labels = all("label" in annotation for annotation in batch.annotations)
        if batch.images.dim() != 5 or not has_labels:
            raise RefusedInput(
                f"stream {batch.streams[0]!r}: {batch.ids[0]} is not a pair of images with a "
                "label: make the set with `python tools/prepare_data.py nlvr2`"
            )
        self._tokens = len(batch.token_ids)
        images, sentences = to_model_input(batch, self.device, self.dtype)
        labels = [int(annotation["label"]) for annotation in batch.annotations]
        return first_then_second(images), sentences, to_device(labels, self.device, torch.int64)

    def flops_per_step(self) -> float:
        """Estimate the FLOPs of one optimizer step on this rank from the last micro-batch."""
        pairs = self.batch_size
        tokens, width = networks.image_shape(self.config)
        work = TextWork(pairs, self._tokens, pairs, pairs * tokens, width, cross_attentions=2)
        return self.accumulation * fine_tuning_flops(self.config, 2 * pairs, [work])

    def evaluate(self, engine: ZeroEngine, final: bool) -> Evaluation:
        """Compute the accuracy on all held-out sets. The score is that of the first."""
        network = self.whole(engine, lambda: self.limited(NLVR2(self.config)))
        evaluation = Evaluation()
        for name, pairs in self.heldout_sets():
            judgements = judgements_of(network, pairs, self.recipe, self.tokenizer)
            scalars = accuracy(judgements, pairs)
            shown = captions_and_pairs.shown_images(len(pairs), self.recipe)
            panels = panels_of(pairs, shown, judgements)
            evaluation = evaluation.with_set(name, scalars, scalars["accuracy"], panels)
        return evaluation


def first_then_second(images: Tensor) -> Tensor:
    """Reorder [B, 2, 3, H, W] to [2B, 3, H, W]: all first images, then all second ones."""
    return images.transpose(0, 1).flatten(0, 1)


@torch.no_grad()
def judgements_of(
    network: NLVR2, pairs: HeldoutPairs, recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> list[list[bool]]:
    """Judge whether each sentence of each pair is true. The work is divided among the ranks.

    The images keep their order. The published code also swaps them at random during evaluation.
    """
    device, enc = next(network.parameters()).device, network.config.text.special.enc
    judgements: list[list[bool]] = []
    for indices in captions_and_pairs.my_batches(len(pairs), recipe.evaluation.batch_size):
        sentences = [pairs.captions[index] for index in indices]
        owners = [place for place, texts in enumerate(sentences) for _ in texts]
        flat = list(chain.from_iterable(sentences))
        packed = pack_captions(tokenizer, flat, recipe.model.text.max_tokens)
        text = packed_text(packed, device).with_first_token(enc)
        images = to_pixels(pairs.images(indices)[owners], network)
        answers = iter(network(first_then_second(images), text).argmax(-1).tolist())
        judgements += [[bool(next(answers)) for _ in texts] for texts in sentences]
    return list(chain.from_iterable(collectives.all_gather_objects(judgements)))


def accuracy(judgements: list[list[bool]], pairs: HeldoutPairs) -> dict[str, float]:
    """Compute accuracy, the share of the more frequent label, and the number of sentences.

    Raises:
        ValueError: a sentence has no label.
    """
    annotations = list(chain.from_iterable(pairs.annotations))
    if not all("label" in annotation for annotation in annotations):
        raise ValueError(f"{pairs.name}: a sentence without a label; is it an NLVR2 set?")
    labels = [bool(annotation["label"]) for annotation in annotations]
    flat = list(chain.from_iterable(judgements))
    right = sum(map(bool.__eq__, flat, labels))
    true = sum(labels) / len(labels)
    return {
        "accuracy": right / len(labels),
        "majority": max(true, 1 - true),
        "sentences": float(len(labels)),
    }


def panels_of(pairs: HeldoutPairs, shown: list[int], judgements: list[list[bool]]) -> list[Panel]:
    """Make pictures of both images side by side, with their first sentence."""
    panels = []
    for index in shown:
        side_by_side = torch.cat(pairs.images([index])[0].unbind(0), dim=-1)
        text = f"{pairs.captions[index][0]}: {judgements[index][0]}"
        panels.append(Panel(side_by_side, text, str(pairs.annotations[index][0]["label"])))
    return panels
