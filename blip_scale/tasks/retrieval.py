"""Fine-tuning for image-text retrieval: ITC with momentum distillation and ITM, where texts of one
image are no negatives of each other.

Legend: B micro-batch of this rank, W ranks, E embed_dim, Q queue, K = B + Q keys.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
import xxhash
from torch import Tensor

from blip_scale.data.loading.micro_batches import Batch
from blip_scale.engine import collectives
from blip_scale.engine.task import Evaluation, Progress
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.evaluation import captions_and_pairs
from blip_scale.inference.inputs import to_model_input
from blip_scale.model.flops import retrieval_flops
from blip_scale.model.med import MomentumEncoder
from blip_scale.model.packing import PackedText
from blip_scale.objectives import contrastive
from blip_scale.objectives.contrastive import FeaturePair, itc_loss
from blip_scale.objectives.matching import draw_negatives, itm_loss, pair_labels
from blip_scale.tasks.hard_pairs import global_pairs, local_pairs
from blip_scale.tasks.momentum import Contrast, MomentumNetwork, MomentumTask


class RetrievalNetwork(MomentumNetwork):
    """The encoders with their momentum copies; a forward is one micro-step without side effect."""

    def forward(
        self,
        images: Tensor,
        text: PackedText,
        image_ids: Tensor,
        queue: tuple[FeaturePair, Tensor],
        alpha: float,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Losses, metrics, and the momentum features that the queue takes after the step.

        Args:
            images: [B, 3, H, W] normalised, in the type of the weights.
            text: B captions, first token [CLS].
            image_ids: [B] int64, equal where the image is the same.
            queue: momentum features of earlier steps [E, Q] each, and their image ids [Q].
            alpha: weight of the soft targets.
            generator: draws the hard negatives; on the device of the images.
        """
        med = self.med
        image_embeds, online = self.online_features(images, text)
        temperature = med.temperature()
        features, queue_ids = queue
        with torch.no_grad():
            keys = self.momentum_features(images, text)
            targets = contrastive.similarities(keys, keys, features, temperature)
        similarities = contrastive.similarities(online, keys, features, temperature)
        positives_BK = image_ids[:, None] == torch.cat([image_ids, queue_ids])
        itc = itc_loss(similarities, targets, alpha, positives_BK)
        everywhere = self.settings.negatives == "global"
        pool, pool_ids = online, image_ids
        if everywhere:
            pool = FeaturePair(
                collectives.all_gather(online.image), collectives.all_gather(online.text)
            )
            pool_ids = collectives.all_gather(image_ids)
        same_BP = image_ids[:, None] == pool_ids
        negatives = draw_negatives(
            online.text.detach() @ pool.image.detach().T / temperature.detach(),
            online.image.detach() @ pool.text.detach().T / temperature.detach(),
            generator,
            same_image_BP=same_BP,
        )
        pairs = (global_pairs if everywhere else local_pairs)(image_embeds, text, negatives)
        texts = pairs.texts.with_first_token(med.config.text.special.enc)
        logits = med.match(texts, pairs.image_embeds, pairs.image_index)
        labels = pair_labels(negatives, same_BP)
        itm = itm_loss(logits, labels)
        return {
            "loss/total": itc + itm,
            "loss/itc": itc.detach(),
            "loss/itm": itm.detach(),
            **Contrast(similarities, temperature, keys).metrics(logits, labels),
        }


class Retrieval(MomentumTask):
    """The retrieval task: what `engine.task.Task` asks for."""

    head = "retrieval"
    keeps_image_ids = True

    def build_network(self) -> RetrievalNetwork:
        """The encoders' part of the MED and momentum encoders, weights not filled."""
        momentum = MomentumEncoder(self.config)
        return RetrievalNetwork(self.build_med(), momentum, self.recipe.objective)

    def losses(
        self, network: Callable[..., Any], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        """One forward of the network on a micro-batch; keeps its momentum features for the
        queue."""
        images, text = to_model_input(batch, self.device, self.dtype)
        image_ids = image_ids_of(batch).to(self.device, non_blocking=True)
        assert self.queue.image_ids is not None
        queue = (self.queue.features, self.queue.image_ids)
        alpha = self.alpha(progress)
        found = network(images, text, image_ids, queue, alpha, self.generator())
        return self.noted(found, batch, progress, image_ids)

    def flops_per_step(self) -> float:
        """Of the micro-batches of one optimizer step on this rank, counted from the last one."""
        queue_size = self.recipe.objective.queue_size
        return self.accumulation * retrieval_flops(
            self.config, self.batch_size, self._tokens, queue_size
        )

    def evaluate(self, engine: ZeroEngine, final: bool) -> Evaluation:
        """Recalls on the held-out sets, re-ranked; their mean on the first set is the score."""
        med = self.whole_med(engine)
        found = Evaluation()
        for name, pairs in captions_and_pairs.heldout_sets(self.recipe):
            figures = captions_and_pairs.retrieval_on(med, pairs, self.recipe, self.tokenizer, True)
            recalls = [value for figure, value in figures.items() if figure.startswith("itm_")]
            found = found.with_set(name, figures, fmean(recalls))
        return found


def image_ids_of(batch: Batch) -> Tensor:
    """[B] int64: the same for pairs of one image, whatever batch they come in (hashes of stream and
    id; among 10^6 images two of the same hash are a matter of one in 10^7)."""
    names = zip(batch.streams, batch.ids, strict=True)
    return torch.tensor([xxhash.xxh3_64_intdigest(f"{s}/{i}") >> 1 for s, i in names])
