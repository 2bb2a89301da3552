"""BLIP's pretraining: ITC, ITM and LM on one MED.

Legend: B micro-batch of this rank, E embed_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip_scale.engine import collectives
from blip_scale.engine.task import Evaluation
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.evaluation import captions_and_pairs
from blip_scale.model.packing import PackedText
from blip_scale.objectives.contrastive import FeaturePair
from blip_scale.objectives.language import lm_loss
from blip_scale.objectives.matching import HardNegatives, draw_negatives, itm_loss, match_labels
from blip_scale.tasks.contrast import EncodedPairs, of_all_ranks
from blip_scale.tasks.contrastive_task import ContrastiveNetwork, ContrastiveTask
from blip_scale.tasks.hard_pairs import TextSizes, global_pairs, local_pairs


class PretrainNetwork(ContrastiveNetwork):
    """The MED and its contrast. A forward is one micro-step, without side effects."""

    def forward(
        self,
        images: Tensor,
        text: PackedText,
        inputs: Any,
        generator: torch.Generator,
        image_ids: Tensor | None = None,
        sizes: TextSizes | None = None,
    ) -> dict[str, Tensor]:
        """Losses, metrics, and the contrast's keys (see `figures`).

        Args:
            images: [B, 3, H, W] normalised, in the type of the weights.
            text: B captions, first token [CLS].
            inputs: from `Contrast.inputs`.
            generator: generator of the hard negatives, on the device of the images.
            image_ids: see `EncodedPairs`.
            sizes: static sizes of the texts of ITM. Needed if negatives are drawn from several
                ranks. None: texts are not filled up.
        """
        med, settings = self.med, self.settings
        image_embeds, encoded, contrasted = self.contrasted(images, text, inputs, image_ids)
        batch = len(images)
        sizes = sizes or TextSizes(text.segments.max_length)
        if settings.negatives == "local":
            similarities = contrasted.similarities
            negatives = draw_negatives(
                similarities.text_to_image[:, :batch],
                similarities.image_to_text[:, :batch],
                generator,
            )
            pairs = local_pairs(image_embeds, text, negatives, sizes)
        else:
            negatives = _global_negatives(encoded, contrasted.keys, generator)
            pairs = global_pairs(image_embeds, text, negatives, sizes)
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
            "loss/total": contrasted.loss + itm + lm,
            "loss/itc": contrasted.loss.detach(),
            "loss/itm": itm.detach(),
            "loss/lm": lm.detach(),
            **pairs.retry,
            **self.figures(encoded, contrasted, itm_logits, labels),
        }


@torch.no_grad()
def _global_negatives(
    encoded: EncodedPairs, keys: FeaturePair, generator: torch.Generator
) -> HardNegatives:
    """Negatives of all ranks, drawn by their similarity to this rank's pairs."""
    online, temperature = encoded.features, encoded.temperature
    pool = of_all_ranks(keys)
    return draw_negatives(
        online.text @ pool.image.T / temperature,
        online.image @ pool.text.T / temperature,
        generator,
        first_positive=collectives.rank() * len(online.image),
    )


class Pretrain(ContrastiveTask):
    """The pretraining task; implements `engine.task.Task`."""

    head = "pretrain"

    def build_network(self) -> PretrainNetwork:
        """MED and the contrast's network, with unset weights."""
        med = self.build_med()
        return PretrainNetwork(med, self.contrast.build_network(), self.recipe.objective)

    def evaluate(self, engine: ZeroEngine, final: bool) -> Evaluation:
        """Held-out retrieval and captions on a whole copy of the MED."""
        return captions_and_pairs.evaluate(
            self.whole_med(engine), self.recipe, self.tokenizer, final
        )
