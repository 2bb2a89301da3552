"""Base of pretraining and retrieval: a contrastive loss, and ITM on hard negatives.

Legend: B micro-batch of this rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import xxhash
from torch import Tensor, nn

from blip_scale.config.batch_sizes import token_bucket
from blip_scale.config.recipe import ObjectiveRecipe, Recipe
from blip_scale.data.loading.micro_batches import Batch, CaptionInput
from blip_scale.engine import collectives
from blip_scale.engine.task import Progress
from blip_scale.engine.transfers import to_device
from blip_scale.engine.watching.monitor import Alarm
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.engine.zero.momentum import ShardedMomentum
from blip_scale.inference.inputs import to_model_input
from blip_scale.model.flops import at_image_size, med_flops
from blip_scale.model.heads import freeze_unread
from blip_scale.model.med import MED
from blip_scale.model.packing import PackedText
from blip_scale.objectives.contrastive import FeaturePair, retrieval_accuracy
from blip_scale.objectives.matching import match_accuracy, predicts_one_class
from blip_scale.tasks.base import TrainingTask
from blip_scale.tasks.contrast import Contrast, Contrasted, EncodedPairs
from blip_scale.tasks.hard_pairs import text_sizes
from blip_scale.tasks.in_batch_contrast import InBatchContrast
from blip_scale.tasks.momentum_contrast import MomentumContrast
from blip_scale.tasks.sigmoid_contrast import SigmoidContrast

CONTRASTS: dict[str, type[Contrast]] = {
    "momentum": MomentumContrast,
    "in_batch": InBatchContrast,
    "sigmoid": SigmoidContrast,
}
"""Value of `objective.itc` -> class of the contrast."""

TEMPERATURE = "med.temperature.value"
TEMPERATURE_RANGE = (0.001, 0.5)

ONE_CLASS_ALARM = Alarm(
    "itm_one_class",
    lambda logged: predicts_one_class(
        logged["loss/itm"], logged["itm/accuracy_match"], logged["itm/accuracy_mismatch"]
    ),
    "ITM predicts one class for every pair, usually with a loss of 0.6365. This is normal at the "
    "start. If it lasts, check that captions fit their images and that ITC falls (its similarities "
    "choose the hard negatives), and try a lower optimizer.peak_lr or a longer warm-up.",
    points=10,
)


class ContrastiveNetwork(nn.Module):
    """A MED and a contrast's network. A forward is one micro-step, without side effects."""

    def __init__(self, med: MED, contrast: nn.Module, settings: ObjectiveRecipe) -> None:
        super().__init__()
        self.med = med
        self.contrast = contrast
        self.settings = settings

    def contrasted(
        self, images: Tensor, text: PackedText, inputs: Any, image_ids: Tensor | None
    ) -> tuple[Tensor, EncodedPairs, Contrasted]:
        """Return image tokens [B, N, D], the encoded pairs, and the contrast's output."""
        med = self.med
        image_embeds = med.encode_image(images)
        image_features = med.project_image(image_embeds)
        features = FeaturePair(image_features, med.project_text(med.encode_text(text)))
        pairs = EncodedPairs(images, text, features, med.temperature(), image_ids)
        return image_embeds, pairs, self.contrast(pairs, inputs)

    def weighed(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return each loss for the log, and `loss/total`, their sum with the recipe's weights."""
        weights = {
            "itc": self.settings.itc_weight,
            "itm": self.settings.itm_weight,
            "lm": self.settings.lm_weight,
        }
        terms = [
            loss if weights[name] == 1.0 else weights[name] * loss for name, loss in losses.items()
        ]
        logged = {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        return {"loss/total": sum(terms[1:], terms[0]), **logged}

    @staticmethod
    def figures(pairs: EncodedPairs, contrasted: Contrasted) -> dict[str, Tensor]:
        """Return the network's outputs other than losses and ITM accuracies.

        These are the in-batch accuracies of ITC, the temperature, the contrast's metrics, its keys
        [B, E] as `image_keys` and `text_keys`, and `image_ids` [B] if pairs have them.
        """
        i2t, t2i = retrieval_accuracy(contrasted.similarities)
        return {
            "itc/in_batch_i2t": i2t,
            "itc/in_batch_t2i": t2i,
            "train/temperature": pairs.temperature.detach().float().reshape(()),
            **contrasted.metrics,
            "image_keys": contrasted.keys.image.detach(),
            "text_keys": contrasted.keys.text.detach(),
            **({} if pairs.image_ids is None else {"image_ids": pairs.image_ids}),
        }


def match_figures(itm_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Compute the accuracies of ITM on matched and on mismatched pairs."""
    on_match, on_mismatch = match_accuracy(itm_logits, labels)
    return {"itm/accuracy_match": on_match, "itm/accuracy_mismatch": on_mismatch}


class ContrastiveTask(TrainingTask):
    """Task whose network is a `ContrastiveNetwork`. `objective.itc` selects its contrast."""

    alarms: tuple[Alarm, ...] = (ONE_CLASS_ALARM,)
    knows_images: ClassVar[bool] = False
    """Whether pairs have image ids, which identify pairs of the same image."""
    decodes: bool = True
    """Whether captions also go through the decoder."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        kind = contrast_named(recipe.objective.itc)
        self._image_size = recipe.model.vision.image_size
        super().__init__(recipe, device)
        self.matches = recipe.objective.itm != "none"
        """Whether ITM is trained."""
        if not self.matches:
            self.alarms = tuple(alarm for alarm in self.alarms if alarm is not ONE_CLASS_ALARM)
        self.contrast = kind(recipe, self.config, device, self.knows_images)
        self.momentum_pairs = {
            f"contrast.{copy}": f"med.{online}"
            for copy, online in self.contrast.momentum_pairs.items()
        }

    @abstractmethod
    def build_network(self) -> ContrastiveNetwork:
        """Build the MED and the contrast's network, with unset weights."""

    def build_med(self) -> MED:
        """Build a MED for this head. Freeze the modules that no loss reads."""
        return freeze_unread(super().build_med(), self.matches, self.decodes)

    def text_input(self) -> CaptionInput:
        """Return the base class's settings, with padding to static sizes if the recipe asks."""
        bucket = token_bucket(self.recipe, self.batch_size, self.device.type == "cuda")
        return replace(super().text_input(), pad_tokens_to=bucket)

    def initial_weights(self) -> dict[str, Tensor]:
        """Return the weights of the MED and of the contrast."""
        weights = self.contrast.initial_weights()
        prefixed = {f"contrast.{name}": weight for name, weight in weights.items()}
        return super().initial_weights() | prefixed

    @property
    def capture_obstacle(self) -> str | None:
        """Reason why a CUDA graph can't capture the forward; None if it can.

        The reasons are random states, changing shapes, and communication between ranks.
        """
        if self.recipe.model.gradient_checkpointing:
            return "model.gradient_checkpointing reads random states, which a capture can't"
        if token_bucket(self.recipe, self.batch_size, self.device.type == "cuda") == 1:
            return "with train.pad_tokens_to: 1 every batch has other shapes"
        if collectives.world_size() > 1:
            objective = self.recipe.objective
            if self.contrast.exchanges:
                return f"objective.itc: {objective.itc} exchanges features in the forward pass"
            if objective.itm == "global":
                return "objective.itm: global exchanges between ranks in the forward pass"
        return None

    def inputs(self, batch: Batch, progress: Progress) -> tuple[Any, ...]:
        """Return images, captions, contrast inputs, generator, image ids, and ITM text sizes."""
        self._tokens, self._image_size = batch.caption_tokens, batch.images.shape[-1]
        images, text = to_model_input(batch, self.device, self.dtype)
        image_ids = None
        if self.knows_images:
            image_ids = to_device(image_hashes(batch), self.device, torch.int64)
        sizes = text_sizes(batch, self.recipe.model.text.max_tokens, progress.full_capacity)
        contrast = self.contrast.inputs(progress)
        return images, text, contrast, self.generator(), image_ids, sizes

    def collect(self, outputs: dict[str, Tensor], progress: Progress) -> None:
        """Pass the keys to the contrast."""
        keys = FeaturePair(outputs["image_keys"], outputs["text_keys"])
        self.contrast.collect(keys, outputs.get("image_ids"), progress.step)

    def flops_per_step(self) -> float:
        """Estimate the FLOPs of one optimizer step on this rank from the last micro-batch."""
        config = at_image_size(self.config, self._image_size)
        sizes = self.batch_size, self._tokens
        med = med_flops(config, *sizes, self.decodes, self.matches)
        return self.accumulation * (med + self.contrast.flops(config, *sizes))

    def after_step(self, engine: ZeroEngine, momentum: ShardedMomentum, applied: bool) -> None:
        """Clamp the temperature, then update the contrast."""
        if applied:
            for piece in engine.slices:
                if piece.name == TEMPERATURE:
                    # Clamp the fp32 master weight: it would overwrite a clamped bf16 copy.
                    piece.weight.clamp_(*TEMPERATURE_RANGE)
            engine.refresh([TEMPERATURE])
        self.contrast.after_step(engine, momentum, applied)

    def metrics(self, engine: ZeroEngine, momentum: ShardedMomentum) -> dict[str, float]:
        """Return the metrics of the contrast."""
        return self.contrast.metrics(engine, momentum)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the loader's position, the names of the losses, and the contrast's state."""
        state, tensors = super().state_dict()
        contrast_state, contrast_tensors = self.contrast.state_dict()
        state |= {"objective": self.loss_names()}
        return state | contrast_state, tensors | contrast_tensors

    def loss_names(self) -> dict[str, str]:
        """Return the settings of `objective` that select losses, with their values."""
        objective = self.recipe.objective
        return {"itc": objective.itc, "itm": objective.itm, "lm": objective.lm}

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse to resume with other adapters or losses. Old checkpoints don't name the losses."""
        super().check_state(state)
        for name, here in self.loss_names().items():
            saved = state.get("objective", {}).get(name, here)
            if saved != here:
                raise ValueError(
                    f"objective.{name}: {here}, but the checkpoint was trained with {saved}; give "
                    f"objective.{name}={saved}, or start a new run from it with model.checkpoint "
                    "and another output_dir"
                )

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restore the loader's position and the contrast's state."""
        super().load_state_dict(state, tensors)
        self.contrast.load_state_dict(state, tensors)


def contrast_named(name: str) -> type[Contrast]:
    """Return the class of `CONTRASTS` with this name.

    Raises:
        ValueError: no contrast has this name.
    """
    if name not in CONTRASTS:
        raise ValueError(
            f"objective.itc: {name!r} is not a contrastive loss; give {' or '.join(CONTRASTS)}"
        )
    return CONTRASTS[name]


def image_hashes(batch: Batch) -> list[int]:
    """Hash stream and id of each pair to 63 bits. Pairs of the same image get equal numbers.

    This holds across batches. The probability that two of 10^6 images share a number is 10^-7.
    """
    names = zip(batch.streams, batch.ids, strict=True)
    return [xxhash.xxh3_64_intdigest(f"{stream}/{name}") >> 1 for stream, name in names]
