"""Fine-tuning of the image-grounded decoder for captions, and captions measured.

Legend: B micro-batch of this rank, P predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from blip_scale import data, objectives
from blip_scale.engine.deepspeed import ZeroEngine
from blip_scale.engine.task import Evaluation, Progress
from blip_scale.metrics import caption_scores
from blip_scale.model import MED, PackedText, captioning_flops
from blip_scale.recipe import Recipe
from blip_scale.tasks import heldout, networks
from blip_scale.tasks.training import TrainingTask

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
        positions_P = inputs.segments.positions(len(targets_P))
        targets_P = targets_P.masked_fill(positions_P < self.prompt_tokens, objectives.IGNORED)
        loss = objectives.lm_loss(logits_PV, targets_P, self.label_smoothing)
        return {"loss/total": loss, "loss/lm": loss.detach()}


class Captioning(TrainingTask):
    """The captioning task: what `engine.task.Task` asks for."""

    head = "captioning"

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        prompt = networks.prompt_ids(recipe.model.text.prompt, self.tokenizer)
        self._prompt_tokens = len(prompt) - 1

    def build_network(self) -> CaptioningNetwork:
        """The decoder's part of the MED, weights not filled."""
        smoothing = self.recipe.objective.label_smoothing
        return CaptioningNetwork(self.build_med(), self._prompt_tokens, smoothing)

    def losses(
        self, network: Callable[..., Any], batch: data.Batch, progress: Progress
    ) -> dict[str, Tensor]:
        """One forward of the network on a micro-batch."""
        self._tokens = len(batch.token_ids)
        images, text = networks.to_model_input(batch, self.device, self.dtype)
        return network(images, text) | self.stream_shares(batch)

    def flops_per_step(self) -> float:
        """Of the micro-batches of one optimizer step on this rank, counted from the last one."""
        return self.accumulation * captioning_flops(self.config, self.batch_size, self._tokens)

    def evaluate(self, engine: ZeroEngine, final: bool) -> Evaluation:
        """Captions of all held-out images; BLEU-4 and CIDEr of the first set give the score."""
        med = self.whole_med(engine)
        found = Evaluation()
        for name, pairs in heldout.heldout_sets(self.recipe):
            every = range(len(pairs))
            said = heldout.captions_of(med, pairs, every, self.recipe, self.tokenizer)
            scores = caption_scores(said, pairs.captions, SELECTION).values
            shown = heldout.shown_images(len(pairs), self.recipe)
            panels, entries = heldout.panels_of(name, pairs, shown, [said[i] for i in shown])
            score = sum(scores.values()) if found.score is None else found.score
            found = Evaluation(
                found.scalars | {f"{name}/{metric}": value for metric, value in scores.items()},
                found.panels | {name: panels},
                [*found.captions, *entries],
                score,
            )
        return found
