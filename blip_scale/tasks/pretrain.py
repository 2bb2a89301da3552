"""BLIP's pretraining: ITC, ITM and LM on one MED, with momentum encoders and feature queues.

Legend: B micro-batch of this rank, W ranks, E embed_dim, Q queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blip_scale import data, objectives
from blip_scale.batch_sizes import batch_sizes
from blip_scale.engine import collectives
from blip_scale.engine.deepspeed import ZeroEngine
from blip_scale.engine.monitor import Alarm
from blip_scale.engine.sharded_momentum import ShardedMomentum
from blip_scale.engine.task import Evaluation, Progress
from blip_scale.model import (
    MED,
    MomentumEncoder,
    PackedText,
    Segments,
    pretraining_flops,
    resolve_kernel,
)
from blip_scale.objectives import FeaturePair, FeatureQueue
from blip_scale.recipe import ObjectiveRecipe, Recipe
from blip_scale.tasks import heldout, networks

TEMPERATURE_RANGE = (0.001, 0.5)


class PretrainNetwork(nn.Module):
    """The MED and its momentum encoders; one forward is one micro-step, without any side effect."""

    def __init__(self, med: MED, momentum: MomentumEncoder, settings: ObjectiveRecipe) -> None:
        super().__init__()
        self.med = med
        self.momentum = momentum.requires_grad_(False)
        self.settings = settings

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
        image_embeds = med.encode_image(images)
        online = FeaturePair(
            med.project_image(image_embeds), med.project_text(med.encode_text(text))
        )
        temperature = med.temperature()
        with torch.no_grad():
            keys = self._momentum_features(images, text)
            targets = objectives.similarities(keys, keys, queue, temperature)
        similarities = objectives.similarities(online, keys, queue, temperature)
        itc = objectives.itc_loss(similarities, targets, alpha)
        if settings.negatives == "local":
            pairs = _local_pairs(image_embeds, text, similarities, generator)
        else:
            pairs = _global_pairs(image_embeds, text, (online, keys), temperature, generator)
        special = med.config.text.special
        itm_logits, lm_logits, lm_targets = med.sweep(
            pairs.texts.with_first_token(special.enc),
            text.with_first_token(special.dec),
            pairs.image_embeds,
            pairs.image_index,
            torch.arange(len(images), device=images.device),
        )
        labels = objectives.match_labels(len(images), images.device)
        itm = objectives.itm_loss(itm_logits, labels)
        lm = objectives.lm_loss(lm_logits, lm_targets, settings.label_smoothing)
        i2t, t2i = objectives.retrieval_accuracy(similarities)
        on_match, on_mismatch = objectives.match_accuracy(itm_logits, labels)
        return {
            "loss/total": itc + itm + lm,
            "loss/itc": itc.detach(),
            "loss/itm": itm.detach(),
            "loss/lm": lm.detach(),
            "itc/in_batch_i2t": i2t,
            "itc/in_batch_t2i": t2i,
            "itm/accuracy_match": on_match,
            "itm/accuracy_mismatch": on_mismatch,
            "train/temperature": temperature.detach().float().reshape(()),
            "image_keys": keys.image,
            "text_keys": keys.text,
        }

    def _momentum_features(self, images: Tensor, text: PackedText) -> FeaturePair:
        momentum = self.momentum
        return FeaturePair(
            momentum.project_image(momentum.encode_image(images)),
            momentum.project_text(momentum.encode_text(text)),
        )


class _Pairs(NamedTuple):
    """The 3B image-text pairs of ITM: matched, wrong image, wrong text (blip_spec section 4)."""

    texts: PackedText
    image_embeds: Tensor
    image_index: Tensor


def _local_pairs(
    image_embeds: Tensor,
    text: PackedText,
    similarities: objectives.Similarities,
    generator: torch.Generator,
) -> _Pairs:
    """Negatives out of this rank's own batch, as published."""
    batch = len(image_embeds)
    negatives = objectives.draw_negatives(
        similarities.text_to_image[:, :batch], similarities.image_to_text[:, :batch], generator
    )
    own = torch.arange(batch, device=image_embeds.device)
    texts = PackedText.concatenate([text, text, text.select(negatives.text)])
    return _Pairs(texts, image_embeds, torch.cat([own, negatives.image, own]))


def _global_pairs(
    image_embeds: Tensor,
    text: PackedText,
    features: tuple[FeaturePair, FeaturePair],
    temperature: Tensor,
    generator: torch.Generator,
) -> _Pairs:
    """Negatives out of the batches of all ranks; gradients go back to the rank that owns an image.

    The loss of a rank reaches image tokens of others, and the backward of the gather sums what all
    ranks send: with the mean over ranks that data parallelism takes, that is the gradient of the
    mean loss.
    """
    online, keys = features
    batch = len(image_embeds)
    pool = FeaturePair(collectives.all_gather(keys.image), collectives.all_gather(keys.text))
    with torch.no_grad():
        negatives = objectives.draw_negatives(
            online.text @ pool.image.T / temperature,
            online.image @ pool.text.T / temperature,
            generator,
            first_positive=collectives.rank() * batch,
        )
    all_embeds = collectives.all_gather_with_gradient(image_embeds)
    token_ids = torch.cat(collectives.all_gather_ragged(text.token_ids))
    lengths = collectives.all_gather(text.segments.lengths).tolist()
    all_text = PackedText(token_ids, Segments.from_lengths(lengths, token_ids.device))
    own = torch.arange(batch, device=image_embeds.device)
    return _Pairs(
        PackedText.concatenate([text, text, all_text.select(negatives.text)]),
        torch.cat([image_embeds, all_embeds[negatives.image]]),
        torch.cat([own, own + batch, own]),
    )


ONE_CLASS_ALARM = Alarm(
    lambda logged: objectives.predicts_one_class(
        logged["loss/itm"], logged["itm/accuracy_match"], logged["itm/accuracy_mismatch"]
    ),
    "ITM gives every pair the same answer (its loss sits at 0.6365 then). Usual at the very start; "
    "if it lasts, look whether captions fit their images, whether ITC falls (its similarities "
    "choose the hard negatives), and try a lower optimizer.peak_lr or a longer warm-up.",
    points=10,
)


class Pretrain:
    """The pretraining task: what `engine.task.Task` asks for."""

    alarms: tuple[Alarm, ...] = (ONE_CLASS_ALARM,)

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self._tokenizer = data.load_tokenizer(recipe.model.text)
        self._config = networks.med_config(recipe, self._tokenizer)
        sizes = batch_sizes(recipe, collectives.world_size())
        self._batch_size, self._accumulation = sizes.micro_batch, sizes.accumulation
        self._loader = networks.train_loader(recipe, self._tokenizer, self._batch_size)
        self.steps_per_epoch = self._loader.samples_per_epoch // recipe.train.global_batch_size
        self._queue = FeatureQueue(
            recipe.model.embed_dim, recipe.objective.queue_size, recipe.seed, device
        )
        self.kernel: str = resolve_kernel(recipe.model.attention, device, self._dtype)
        self._collected: list[FeaturePair] = []
        self._tokens = 0
        self._step = 0
        meta = self._on_meta()
        self.momentum_pairs = {
            f"momentum.{name}": f"med.{name}" for name, *_ in meta.momentum.pairs(meta.med)
        }

    def _on_meta(self) -> PretrainNetwork:
        with torch.device("meta"):
            return self.build_network()

    def build_network(self) -> PretrainNetwork:
        """MED and momentum encoders, weights not filled."""
        return PretrainNetwork(
            MED(self._config), MomentumEncoder(self._config), self.recipe.objective
        )

    def initial_weights(self) -> dict[str, Tensor]:
        """Weights of the recipe's checkpoints, random from the seed where there are none."""
        med = networks.initialized_med(self.recipe, self._config)
        return {f"med.{name}": parameter.data for name, parameter in med.named_parameters()}

    def inventory(self) -> list[dict[str, Any]]:
        """The training streams with their shards."""
        return data.inventory(self._loader.stores)

    def batches(self) -> Iterator[data.Batch]:
        """This rank's micro-batches."""
        return iter(self._loader)

    def losses(
        self, network: Callable[..., Any], batch: data.Batch, progress: Progress
    ) -> dict[str, Tensor]:
        """One forward of the network on a micro-batch; keeps its momentum features for the
        queue."""
        objective, epoch_steps = self.recipe.objective, progress.steps_per_epoch
        alpha = objectives.alpha_at(
            progress.step, epoch_steps, objective.alpha, objective.alpha_ramp_epochs
        )
        generator = torch.Generator(self.device)
        generator.manual_seed(torch.initial_seed() ^ 0x5EED)
        images, text = networks.to_model_input(batch, self.device, self._dtype)
        found = network(images, text, self._queue.features, alpha, generator)
        self._collected.append(FeaturePair(found.pop("image_keys"), found.pop("text_keys")))
        self._tokens, self._step = len(batch.token_ids), progress.step
        found["train/alpha"] = torch.tensor(alpha, device=self.device)
        shares = torch.tensor(self._loader.shares(batch), device=self.device)
        names = [f"data/share_{name}" for name in self._loader.stream_names]
        found |= dict(zip(names, shares, strict=True))
        return found

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.recipe.train.precision == "bf16" else torch.float32

    def after_step(self, engine: ZeroEngine, momentum: ShardedMomentum, applied: bool) -> None:
        """Clamp the temperature, move the momentum copies, feed the queue.

        Published order is momentum first in the next step's forward; between the steps nothing
        reads the weights, so here is the same place.
        """
        collected, self._collected = self._collected, []
        if not applied:
            return
        for shard in engine.shards:
            if (
                shard.name == "med.temperature.value"
            ):  # the fp32 master: a clamp of the copy would be undone
                shard.weight.clamp_(*TEMPERATURE_RANGE)
        engine.refresh(["med.temperature.value"])
        objectives.momentum_update_(
            momentum.averages, momentum.weights, self.recipe.objective.momentum
        )
        momentum.refresh()
        for keys in collected:
            gathered = FeaturePair(
                collectives.all_gather(keys.image), collectives.all_gather(keys.text)
            )
            self._queue.enqueue(gathered, self._step)

    def flops_per_step(self) -> float:
        """Of the micro-batches of one optimizer step on this rank, counted from the last one."""
        queue_size = self.recipe.objective.queue_size
        return self._accumulation * pretraining_flops(
            self._config, self._batch_size, self._tokens, queue_size
        )

    def metrics(self, engine: ZeroEngine, momentum: ShardedMomentum) -> dict[str, float]:
        """Queue age and momentum gap."""
        return {"queue/age_steps": self._queue.age(self._step), "momentum/gap": momentum.gap()}

    def evaluate(self, engine: ZeroEngine, final: bool) -> Evaluation:
        """Held-out retrieval and captions on a whole copy of the MED."""
        with torch.device(self.device):
            med = MED(self._config).to(engine.dtype)
        network = engine.module
        assert isinstance(network, PretrainNetwork)
        engine.gather_into(network.med, med)
        return heldout.evaluate(med.eval(), self.recipe, self._tokenizer, final)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Loader position and queue."""
        queue = self._queue.state_dict()
        tensors = {f"queue/{key}": queue.pop(key) for key in ("image", "text", "entered_at")}
        return {"loader": self._loader.state_dict(), "queue": queue}, tensors

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Loader position and queue."""
        self._loader.load_state_dict(state["loader"])
        queue = {key.removeprefix("queue/"): tensor for key, tensor in tensors.items()}
        self._queue.load_state_dict(state["queue"] | queue)

    def close(self) -> None:
        """End the loader's processes."""
        self._loader.close()
