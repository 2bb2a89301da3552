"""BLIP's pretraining: ITC, ITM and LM on one MED.

Legend: B micro-batch of this rank, E embed_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip_scale.config.recipe import Recipe
from blip_scale.engine import collectives
from blip_scale.engine.task import Evaluation
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.evaluation import captions_and_pairs
from blip_scale.model.heads import Head
from blip_scale.model.packing import PackedText
from blip_scale.objectives.contrastive import FeaturePair
from blip_scale.objectives.language import lm_loss
from blip_scale.objectives.matching import HardNegatives, draw_negatives, itm_loss, match_labels
from blip_scale.tasks.contrast import Contrasted, EncodedPairs, of_all_ranks
from blip_scale.tasks.contrastive_task import ContrastiveNetwork, ContrastiveTask, match_figures
from blip_scale.tasks.hard_pairs import Pairs, TextSizes, global_pairs, local_pairs


class PretrainNetwork(ContrastiveNetwork):
    """The MED and its contrastive loss. A forward is one micro-step, without side effects."""

    def forward(
        self,
        images: Tensor,
        text: PackedText,
        inputs: Any,
        generator: torch.Generator,
        image_ids: Tensor | None = None,
        sizes: TextSizes | None = None,
    ) -> dict[str, Tensor]:
        """Compute losses, metrics, and the contrast's keys (see `figures`).

        Args:
            images: [B, 3, H, W] normalised, in the dtype of the weights.
            text: B captions. The first token is [CLS].
            inputs: from `Contrast.inputs`.
            generator: generator that draws the hard negatives, on the device of the images.
            image_ids: see `EncodedPairs`.
            sizes: static sizes of ITM's texts. Required if negatives are drawn from several
                ranks. None: no padding.
        """
        med, settings = self.med, self.settings
        special = med.config.text.special
        image_embeds, encoded, contrasted = self.contrasted(images, text, inputs, image_ids)
        losses, figures = {"itc": contrasted.loss}, self.figures(encoded, contrasted)
        every = torch.arange(len(images), device=images.device)
        captions = text.with_first_token(special.dec)
        if settings.itm == "none":
            if settings.lm != "none":
                predicting, lm_targets = captions.split_targets()
                lm_logits = med.decode(predicting, image_embeds, every)
                losses["lm"] = lm_loss(lm_logits, lm_targets, settings.label_smoothing)
            return {**self.weighed(losses), **figures}
        sizes = sizes or TextSizes(text.segments.max_length)
        pairs = self._hard_pairs(image_embeds, encoded, contrasted, generator, sizes)
        texts = pairs.texts.with_first_token(special.enc)
        labels = match_labels(len(images), images.device)
        if settings.lm == "none":
            itm_logits = med.match(texts, pairs.image_embeds, pairs.image_index)
            losses["itm"] = itm_loss(itm_logits, labels)
        else:
            itm_logits, lm_logits, lm_targets = med.sweep(
                texts, captions, pairs.image_embeds, pairs.image_index, every
            )
            losses["itm"] = itm_loss(itm_logits, labels)
            losses["lm"] = lm_loss(lm_logits, lm_targets, settings.label_smoothing)
        figures |= pairs.retry | match_figures(itm_logits, labels)
        return {**self.weighed(losses), **figures}

    def _hard_pairs(
        self,
        image_embeds: Tensor,
        encoded: EncodedPairs,
        contrasted: Contrasted,
        generator: torch.Generator,
        sizes: TextSizes,
    ) -> Pairs:
        """Select the matched pairs, and pairs with negatives of this rank or of all ranks."""
        if self.settings.itm == "global":
            negatives = _global_negatives(encoded, contrasted.keys, generator)
            return global_pairs(image_embeds, encoded.text, negatives, sizes)
        batch, similarities = len(image_embeds), contrasted.similarities
        negatives = draw_negatives(
            similarities.text_to_image[:, :batch],
            similarities.image_to_text[:, :batch],
            generator,
        )
        return local_pairs(image_embeds, encoded.text, negatives, sizes)


@torch.no_grad()
def _global_negatives(
    encoded: EncodedPairs, keys: FeaturePair, generator: torch.Generator
) -> HardNegatives:
    """Draw negatives from all ranks, by their similarity to this rank's pairs."""
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

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.decodes = recipe.objective.lm != "none"
        self.head = self.head_of(recipe)
        super().__init__(recipe, device)

    @classmethod
    def head_of(cls, recipe: Recipe) -> Head:
        """Return the head of the network that the recipe's losses need."""
        return "pretrain" if recipe.objective.lm != "none" else "retrieval"

    def build_network(self) -> PretrainNetwork:
        """Build the MED and the contrast's network, with unset weights."""
        med = self.build_med()
        return PretrainNetwork(med, self.contrast.build_network(med), self.recipe.objective)

    def evaluate(self, engine: ZeroEngine, final: bool) -> Evaluation:
        """Evaluate held-out retrieval and captions with a whole copy of the MED."""
        return captions_and_pairs.evaluate(
            self.whole_med(engine), self.recipe, self.tokenizer, final
        )
