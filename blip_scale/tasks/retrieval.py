"""Fine-tuning for image-text retrieval: ITC and ITM.

Texts of the same image are not negatives of each other.

Legend: B micro-batch of this rank, P pool of the hard negatives.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from blip_scale.engine import collectives
from blip_scale.engine.task import Evaluation
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.evaluation import captions_and_pairs
from blip_scale.model.packing import PackedText
from blip_scale.objectives.matching import draw_negatives, itm_loss, pair_labels
from blip_scale.tasks.contrast import of_all_ranks
from blip_scale.tasks.contrastive_task import ContrastiveNetwork, ContrastiveTask, match_figures
from blip_scale.tasks.hard_pairs import TextSizes, global_pairs, local_pairs


class RetrievalNetwork(ContrastiveNetwork):
    """The encoders and the contrastive loss. A forward is one micro-step, without side effects."""

    def forward(
        self,
        images: Tensor,
        text: PackedText,
        inputs: Any,
        generator: torch.Generator,
        image_ids: Tensor,
        sizes: TextSizes | None = None,
    ) -> dict[str, Tensor]:
        """Compute losses, metrics, and the contrast's keys (see `figures`).

        See `PretrainNetwork` for the arguments.
        """
        med = self.med
        sizes = sizes or TextSizes(text.segments.max_length)
        image_embeds, encoded, contrasted = self.contrasted(images, text, inputs, image_ids)
        losses, figures = {"itc": contrasted.loss}, self.figures(encoded, contrasted)
        if self.settings.itm == "none":
            return {**self.weighed(losses), **figures}
        online, temperature = encoded.features, encoded.temperature
        everywhere = self.settings.itm == "global"
        pool, pool_ids = online, image_ids
        if everywhere:
            pool = of_all_ranks(online)
            pool_ids = collectives.all_gather(image_ids)
        same_BP = image_ids[:, None] == pool_ids
        negatives = draw_negatives(
            online.text.detach() @ pool.image.detach().T / temperature.detach(),
            online.image.detach() @ pool.text.detach().T / temperature.detach(),
            generator,
            same_image_BP=same_BP,
        )
        pairs_of = global_pairs if everywhere else local_pairs
        pairs = pairs_of(image_embeds, text, negatives, sizes)
        texts = pairs.texts.with_first_token(med.config.text.special.enc)
        logits = med.match(texts, pairs.image_embeds, pairs.image_index)
        labels = pair_labels(negatives, same_BP)
        losses["itm"] = itm_loss(logits, labels)
        figures |= pairs.retry | match_figures(logits, labels)
        return {**self.weighed(losses), **figures}


class Retrieval(ContrastiveTask):
    """The retrieval task; implements `engine.task.Task`."""

    head = "retrieval"
    knows_images = True
    decodes = False

    def build_network(self) -> RetrievalNetwork:
        """Build the MED's encoders and the contrast's network, with unset weights."""
        med = self.build_med()
        return RetrievalNetwork(med, self.contrast.build_network(med), self.recipe.objective)

    def evaluate(self, engine: ZeroEngine, final: bool) -> Evaluation:
        """Compute recalls on the held-out sets, with re-ranking if ITM is trained.

        The score is the mean recall on the first set: re-ranked if ITM is trained, else by ITC.
        """
        med = self.whole_med(engine)
        evaluation = Evaluation()
        for name, pairs in self.heldout_sets():
            figures = captions_and_pairs.retrieval_on(
                med, pairs, self.recipe, self.tokenizer, self.matches
            )
            scored = "itm_" if self.matches else "itc_"
            recalls = [value for figure, value in figures.items() if figure.startswith(scored)]
            evaluation = evaluation.with_set(name, figures, fmean(recalls))
        return evaluation
