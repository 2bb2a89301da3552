"""BLIP's pretraining: ITC, ITM and LM on one MED, with momentum encoders and feature queues.

Legend: B micro-batch of this rank, W ranks, E embed_dim, Q queue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from blip_scale.data.loading.micro_batches import Batch
from blip_scale.engine import collectives
from blip_scale.engine.task import Evaluation, Progress
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.evaluation import captions_and_pairs
from blip_scale.inference.inputs import to_model_input
from blip_scale.model.flops import pretraining_flops
from blip_scale.model.med import MED, MomentumEncoder
from blip_scale.model.packing import PackedText
from blip_scale.objectives import contrastive
from blip_scale.objectives.contrastive import FeaturePair, itc_loss
from blip_scale.objectives.language import lm_loss
from blip_scale.objectives.matching import HardNegatives, draw_negatives, itm_loss, match_labels
from blip_scale.tasks.hard_pairs import global_pairs, local_pairs
from blip_scale.tasks.momentum import Contrast, MomentumNetwork, MomentumTask


class PretrainNetwork(MomentumNetwork):
    """The MED and its momentum encoders; one forward is one micro-step, without any side effect."""

    def forward(
        self,
        images: Tensor,
        text: PackedText,
        queue: FeaturePair,
        alpha: float,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Losses, metrics, and the momentum features that the queue takes after the step.

        Args:
            images: [B, 3, H, W] normalised, in the type of the weights.
            text: B captions, first token [CLS].
            queue: momentum features of earlier steps [E, Q] each.
            alpha: weight of the soft targets.
            generator: draws the hard negatives; on the device of the images.
        """
        med, settings = self.med, self.settings
        image_embeds, online = self.online_features(images, text)
        temperature = med.temperature()
        with torch.no_grad():
            keys = self.momentum_features(images, text)
            targets = contrastive.similarities(keys, keys, queue, temperature)
        similarities = contrastive.similarities(online, keys, queue, temperature)
        itc = itc_loss(similarities, targets, alpha)
        batch = len(images)
        if settings.negatives == "local":
            negatives = draw_negatives(
                similarities.text_to_image[:, :batch],
                similarities.image_to_text[:, :batch],
                generator,
            )
            pairs = local_pairs(image_embeds, text, negatives)
        else:
            negatives = _global_negatives(online, keys, temperature, generator)
            pairs = global_pairs(image_embeds, text, negatives)
        special = med.config.text.special
        itm_logits, lm_logits, lm_targets = med.sweep(
            pairs.texts.with_first_token(special.enc),
            text.with_first_token(special.dec),
            pairs.image_embeds,
            pairs.image_index,
            torch.arange(batch, device=images.device),
        )
        labels = match_labels(batch, images.device)
        itm = itm_loss(itm_logits, labels)
        lm = lm_loss(lm_logits, lm_targets, settings.label_smoothing)
        return {
            "loss/total": itc + itm + lm,
            "loss/itc": itc.detach(),
            "loss/itm": itm.detach(),
            "loss/lm": lm.detach(),
            **Contrast(similarities, temperature, keys).metrics(itm_logits, labels),
        }


@torch.no_grad()
def _global_negatives(
    online: FeaturePair, keys: FeaturePair, temperature: Tensor, generator: torch.Generator
) -> HardNegatives:
    """Drawn from the momentum features of all ranks."""
    pool = FeaturePair(collectives.all_gather(keys.image), collectives.all_gather(keys.text))
    return draw_negatives(
        online.text @ pool.image.T / temperature,
        online.image @ pool.text.T / temperature,
        generator,
        first_positive=collectives.rank() * len(online.image),
    )


class Pretrain(MomentumTask):
    """The pretraining task: what `engine.task.Task` asks for."""

    head = "pretrain"

    def build_network(self) -> PretrainNetwork:
        """MED and momentum encoders, weights not filled."""
        return PretrainNetwork(
            MED(self.config), MomentumEncoder(self.config), self.recipe.objective
        )

    def losses(
        self, network: Callable[..., Any], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        """One forward of the network on a micro-batch; keeps its momentum features for the
        queue."""
        images, text = to_model_input(batch, self.device, self.dtype)
        features, alpha = self.queue.features, self.alpha(progress)
        found = network(images, text, features, alpha, self.generator())
        return self.noted(found, batch, progress)

    def flops_per_step(self) -> float:
        """Of the micro-batches of one optimizer step on this rank, counted from the last one."""
        queue_size = self.recipe.objective.queue_size
        return self.accumulation * pretraining_flops(
            self.config, self.batch_size, self._tokens, queue_size
        )

    def evaluate(self, engine: ZeroEngine, final: bool) -> Evaluation:
        """Held-out retrieval and captions on a whole copy of the MED."""
        return captions_and_pairs.evaluate(
            self.whole_med(engine), self.recipe, self.tokenizer, final
        )
