"""BLIP's contrastive loss: momentum encoders, feature queues and soft targets.

See Li et al. 2022, section 3.2.

Legend: B micro-batch of this rank, E embed_dim, Q queue, K = B + Q keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blip_scale.config.recipe import Recipe
from blip_scale.engine import collectives
from blip_scale.engine.task import Progress
from blip_scale.engine.transfers import to_device
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.engine.zero.momentum import ShardedMomentum
from blip_scale.inference.sizes import limited
from blip_scale.model.flops import momentum_contrast_flops
from blip_scale.model.med import MED, MEDConfig, MomentumEncoder
from blip_scale.objectives.contrastive import FeaturePair, alpha_at, itc_loss, similarities
from blip_scale.objectives.feature_queue import FeatureQueue
from blip_scale.objectives.momentum import momentum_update_
from blip_scale.tasks.contrast import Contrast, Contrasted, EncodedPairs, of_all_ranks


@dataclass(frozen=True)
class MomentumInputs:
    """Queue and scheduled weights that the network reads in a micro-step."""

    queue: FeaturePair
    """Momentum features of earlier steps, [E, Q] each."""
    alpha: Tensor
    """Weight of the soft targets, and weight of the positive, [2] fp64."""
    queue_ids: Tensor | None = None
    """Image of each column of the queue, [Q] int64. Required if pairs have `image_ids`."""


class MomentumContrastNetwork(nn.Module):
    """The momentum encoders, and the loss against their features and the queue."""

    def __init__(self, momentum: MomentumEncoder) -> None:
        super().__init__()
        self.momentum = momentum.requires_grad_(False)

    def forward(self, pairs: EncodedPairs, inputs: MomentumInputs) -> Contrasted:
        """Compute ITC with soft targets. Pairs of the same image are positives of each other."""
        momentum, queue = self.momentum, inputs.queue
        with torch.no_grad():
            keys = FeaturePair(
                momentum.project_image(momentum.encode_image(pairs.images)),
                momentum.project_text(momentum.encode_text(pairs.text)),
            )
            targets = similarities(keys, keys, queue, pairs.temperature)
        scores = similarities(pairs.features, keys, queue, pairs.temperature)
        positives_BK = None
        if pairs.image_ids is not None:
            assert inputs.queue_ids is not None
            ids_K = torch.cat([pairs.image_ids, inputs.queue_ids])
            positives_BK = pairs.image_ids[:, None] == ids_K
        loss = itc_loss(scores, targets, inputs.alpha, positives_BK)
        return Contrasted(loss, scores, keys, {"train/alpha": inputs.alpha[0]})


class MomentumContrast(Contrast):
    """Feature queue, and the updates of the queue and the momentum encoders."""

    def __init__(
        self, recipe: Recipe, config: MEDConfig, device: torch.device, knows_images: bool
    ) -> None:
        super().__init__(recipe, config, device, knows_images)
        self.settings, self.device = recipe.objective, device
        self.queue = FeatureQueue(
            config.embed_dim, self.settings.queue_size, recipe.seed, device, knows_images
        )
        self.collected: list[tuple[FeaturePair, Tensor | None]] = []
        """Momentum features and image ids of the micro-steps since the last optimizer step."""
        self.step = 0
        with torch.device("meta"):
            names = [name for name, _ in self._encoder().named_parameters()]
        self.momentum_pairs = {f"momentum.{name}": name for name in names}

    def build_network(self, med: MED) -> MomentumContrastNetwork:
        """Build the momentum encoders, with unset weights. Share the MED's frozen parameters."""
        network = MomentumContrastNetwork(self._encoder())
        network.momentum.share_frozen(med)
        return network

    def _encoder(self) -> MomentumEncoder:
        return limited(MomentumEncoder(self.config), self.recipe.model)

    def flops(self, config: MEDConfig, batch_size: int, text_tokens: int) -> float:
        """Return the FLOPs of the momentum encoders' forward and of the similarities to keys."""
        return momentum_contrast_flops(config, batch_size, text_tokens, self.settings.queue_size)

    def key_count(self, batch_size: int) -> int:
        """Return the number of keys: the micro-batch plus the queue."""
        return batch_size + self.settings.queue_size

    def inputs(self, progress: Progress) -> MomentumInputs:
        """Return the current queue, and alpha at this step."""
        alpha = alpha_at(
            progress.step + progress.schedule_shift,
            progress.steps_per_epoch,
            self.settings.alpha,
            self.settings.alpha_ramp_epochs,
        )
        weights = to_device([alpha, 1.0 - alpha], self.device)
        return MomentumInputs(self.queue.features, weights, self.queue.image_ids)

    def collect(self, keys: FeaturePair, image_ids: Tensor | None, step: int) -> None:
        """Keep the momentum features until `after_step` adds them to the queue."""
        self.collected.append((keys, image_ids))
        self.step = step

    def after_step(self, engine: ZeroEngine, momentum: ShardedMomentum, applied: bool) -> None:
        """Update the momentum encoders, then add the collected features to the queue.

        BLIP updates the momentum encoders at the start of the next forward. Nothing reads the
        weights in between, so updating here is equivalent.
        """
        collected, self.collected = self.collected, []
        if not applied:
            return
        momentum_update_(momentum.average_runs, momentum.weight_runs, self.settings.momentum)
        momentum.refresh()
        for keys, image_ids in collected:
            gathered = of_all_ranks(keys)
            ids = None if image_ids is None else collectives.all_gather(image_ids)
            self.queue.enqueue(gathered, self.step, ids)

    def metrics(self, engine: ZeroEngine, momentum: ShardedMomentum) -> dict[str, float]:
        """Return the age of the queue, and the distance of the momentum encoders from the MED."""
        return {"queue/age_steps": self.queue.age(self.step), "momentum/gap": momentum.gap()}

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the state of the queue."""
        queue = self.queue.state_dict()
        tensors = {name: queue.pop(name) for name in list(queue) if torch.is_tensor(queue[name])}
        return {"queue": queue}, {f"queue/{name}": t for name, t in tensors.items()}

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restore the queue."""
        queue = {key.removeprefix("queue/"): tensor for key, tensor in tensors.items()}
        self.queue.load_state_dict(state["queue"] | queue)
