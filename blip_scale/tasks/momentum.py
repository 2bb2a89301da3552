"""What tasks with momentum distillation have in common: momentum encoders and feature queues."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blip_scale.config.recipe import ObjectiveRecipe, Recipe
from blip_scale.data.loading.micro_batches import Batch
from blip_scale.engine import collectives
from blip_scale.engine.task import Progress
from blip_scale.engine.watching.monitor import Alarm
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.engine.zero.momentum import ShardedMomentum
from blip_scale.model.med import MED, MomentumEncoder
from blip_scale.model.packing import PackedText
from blip_scale.objectives.contrastive import (
    FeaturePair,
    Similarities,
    alpha_at,
    retrieval_accuracy,
)
from blip_scale.objectives.feature_queue import FeatureQueue
from blip_scale.objectives.matching import match_accuracy, predicts_one_class
from blip_scale.objectives.momentum import momentum_update_
from blip_scale.tasks.base import TrainingTask

TEMPERATURE_RANGE = (0.001, 0.5)

ONE_CLASS_ALARM = Alarm(
    lambda logged: predicts_one_class(
        logged["loss/itm"], logged["itm/accuracy_match"], logged["itm/accuracy_mismatch"]
    ),
    "ITM gives every pair the same answer (its loss sits at 0.6365 then). Usual at the very start; "
    "if it lasts, look whether captions fit their images, whether ITC falls (its similarities "
    "choose the hard negatives), and try a lower optimizer.peak_lr or a longer warm-up.",
    points=10,
)


class MomentumNetwork(nn.Module):
    """A MED and its momentum encoders; a forward is one micro-step, without any side effect."""

    def __init__(self, med: MED, momentum: MomentumEncoder, settings: ObjectiveRecipe) -> None:
        super().__init__()
        self.med = med
        self.momentum = momentum.requires_grad_(False)
        self.settings = settings

    def online_features(self, images: Tensor, text: PackedText) -> tuple[Tensor, FeaturePair]:
        """Image tokens [B, N, D], and the features of both towers, each [B, E]."""
        med = self.med
        image_embeds = med.encode_image(images)
        image_features = med.project_image(image_embeds)
        return image_embeds, FeaturePair(image_features, med.project_text(med.encode_text(text)))

    def momentum_features(self, images: Tensor, text: PackedText) -> FeaturePair:
        """Of the momentum encoders, each [B, E]."""
        momentum = self.momentum
        return FeaturePair(
            momentum.project_image(momentum.encode_image(images)),
            momentum.project_text(momentum.encode_text(text)),
        )


@dataclass(frozen=True)
class Contrast:
    """What a micro-step is judged by beside its losses."""

    similarities: Similarities
    temperature: Tensor
    keys: FeaturePair
    """Momentum features."""

    def metrics(self, itm_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Accuracies and temperature, and `image_keys` and `text_keys` for the queue."""
        i2t, t2i = retrieval_accuracy(self.similarities)
        on_match, on_mismatch = match_accuracy(itm_logits, labels)
        return {
            "itc/in_batch_i2t": i2t,
            "itc/in_batch_t2i": t2i,
            "itm/accuracy_match": on_match,
            "itm/accuracy_mismatch": on_mismatch,
            "train/temperature": self.temperature.detach().float().reshape(()),
            "image_keys": self.keys.image,
            "text_keys": self.keys.text,
        }


class MomentumTask(TrainingTask):
    """A task whose network is a `MomentumNetwork`, with a queue of momentum features."""

    alarms: tuple[Alarm, ...] = (ONE_CLASS_ALARM,)
    keeps_image_ids = False
    """Whether the queue knows which image each feature is of."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.queue = FeatureQueue(
            recipe.model.embed_dim,
            recipe.objective.queue_size,
            recipe.seed,
            device,
            self.keeps_image_ids,
        )
        self.collected: list[tuple[FeaturePair, Tensor | None]] = []
        """Momentum features and image ids of the micro-steps since the last optimizer step."""
        self.step = 0
        with torch.device("meta"):
            network = self.build_network()
        self.momentum_pairs = {
            f"momentum.{name}": f"med.{name}" for name, *_ in network.momentum.pairs(network.med)
        }

    @abstractmethod
    def build_network(self) -> MomentumNetwork:
        """MED and momentum encoders, weights not filled."""

    def alpha(self, progress: Progress) -> float:
        """Weight of the soft targets."""
        objective = self.recipe.objective
        return alpha_at(
            progress.step, progress.steps_per_epoch, objective.alpha, objective.alpha_ramp_epochs
        )

    def generator(self) -> torch.Generator:
        """Draws the hard negatives of this micro-step and rank."""
        generator = torch.Generator(self.device)
        generator.manual_seed(torch.initial_seed() ^ 0x5EED)
        return generator

    def noted(
        self,
        found: dict[str, Tensor],
        batch: Batch,
        progress: Progress,
        image_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The metrics of a forward, with alpha and shares; its momentum features are kept for the
        queue."""
        keys = FeaturePair(found.pop("image_keys"), found.pop("text_keys"))
        self.collected.append((keys, image_ids))
        self._tokens, self.step = len(batch.token_ids), progress.step
        found["train/alpha"] = torch.tensor(self.alpha(progress), device=self.device)
        return found | self.stream_shares(batch)

    def after_step(self, engine: ZeroEngine, momentum: ShardedMomentum, applied: bool) -> None:
        """Clamp the temperature, move the momentum copies, feed the queue.

        Published order is momentum first in the next step's forward; between the steps nothing
        reads the weights, so here is the same place.
        """
        collected, self.collected = self.collected, []
        if not applied:
            return
        for shard in engine.shards:
            if (
                shard.name == "med.temperature.value"
            ):  # the fp32 master: a clamp of the copy would be undone
                shard.weight.clamp_(*TEMPERATURE_RANGE)
        engine.refresh(["med.temperature.value"])
        momentum_update_(momentum.averages, momentum.weights, self.recipe.objective.momentum)
        momentum.refresh()
        for keys, image_ids in collected:
            gathered = FeaturePair(
                collectives.all_gather(keys.image), collectives.all_gather(keys.text)
            )
            ids = None if image_ids is None else collectives.all_gather(image_ids)
            self.queue.enqueue(gathered, self.step, ids)

    def metrics(self, engine: ZeroEngine, momentum: ShardedMomentum) -> dict[str, float]:
        """Queue age and momentum gap."""
        return {"queue/age_steps": self.queue.age(self.step), "momentum/gap": momentum.gap()}

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Loader position and queue."""
        queue = self.queue.state_dict()
        tensors = {name: queue.pop(name) for name in list(queue) if torch.is_tensor(queue[name])}
        state, _ = super().state_dict()
        return state | {"queue": queue}, {f"queue/{name}": t for name, t in tensors.items()}

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Loader position and queue."""
        super().load_state_dict(state, tensors)
        queue = {key.removeprefix("queue/"): tensor for key, tensor in tensors.items()}
        self.queue.load_state_dict(state["queue"] | queue)
