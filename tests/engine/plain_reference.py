"""Reference implementation of BLIP's pretraining step in one plain PyTorch process.

It uses neither the engine nor sharding. Each rank's part of the global batch goes through the
network one after another, or in threads if negatives come from all ranks. The losses are averaged.
Optimizer, momentum and queue are written in the simplest way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from fake_ranks import FakeRanks
from torch import Tensor

from blip_scale.config import recipe
from blip_scale.data.loading.loader import TrainLoader
from blip_scale.data.loading.micro_batches import CaptionInput, LoaderPosition
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.engine.schedule import learning_rate
from blip_scale.engine.step import micro_step_seed
from blip_scale.inference.inputs import to_model_input
from blip_scale.inference.sizes import med_config
from blip_scale.model.med import MomentumEncoder
from blip_scale.objectives.contrastive import FeaturePair, alpha_at
from blip_scale.objectives.feature_queue import FeatureQueue
from blip_scale.tasks import networks
from blip_scale.tasks.momentum_contrast import MomentumContrastNetwork, MomentumInputs
from blip_scale.tasks.pretrain import PretrainNetwork


@dataclass
class Reference:
    """Results of the reference run."""

    losses: dict[int, dict[str, float]]
    weights: dict[str, Tensor]
    momentum: dict[str, Tensor]


def run(file: Path, ranks: int, steps: int) -> Reference:
    """Run the first `steps` steps of a recipe, with the results that `ranks` ranks would have."""
    chosen = recipe.load(str(file), [])
    tokenizer = load_tokenizer(chosen.model.text)
    config = med_config(chosen, tokenizer)
    med = networks.initialized_med(chosen, config)
    momentum_encoder = MomentumEncoder(config)
    momentum_encoder.load_state_dict(med.state_dict(), strict=False)
    contrast = MomentumContrastNetwork(momentum_encoder)
    network = PretrainNetwork(med, contrast, chosen.objective).train()
    settings = chosen.optimizer
    optimizer = torch.optim.AdamW(
        med.parameters(), betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    micro = chosen.train.micro_batch_size or chosen.train.global_batch_size // ranks
    accumulation = chosen.train.global_batch_size // (micro * ranks)
    loaders = [_loader(chosen, tokenizer, rank, ranks, micro) for rank in range(ranks)]
    batches = [iter(loader) for loader in loaders]
    steps_per_epoch = loaders[0].steps_per_epoch
    queue = FeatureQueue(chosen.model.embed_dim, chosen.objective.queue_size, chosen.seed).features
    pointer, losses = 0, {}
    for step in range(steps):
        optimizer.zero_grad()
        entering: list[FeaturePair] = []
        means: dict[str, float] = {}
        objective = chosen.objective
        alpha = alpha_at(step, steps_per_epoch, objective.alpha, objective.alpha_ramp_epochs)
        for index in range(accumulation):

            def forward(
                rank: int, micro_step: int = step * accumulation + index, alpha: float = alpha
            ) -> dict[str, Tensor]:
                seed = micro_step_seed(chosen.seed, micro_step, rank)
                torch.manual_seed(seed)
                generator = torch.Generator().manual_seed(seed ^ 0x5EED)
                images, text = to_model_input(
                    next(batches[rank]), torch.device("cpu"), torch.float32
                )
                weights = torch.tensor([alpha, 1.0 - alpha], dtype=torch.float64)
                return network(images, text, MomentumInputs(queue, weights), generator)

            everyone = _on_all_ranks(forward, ranks, together=objective.itm == "global")
            total = torch.stack([outputs["loss/total"] for outputs in everyone]).sum()
            (total / (ranks * accumulation)).backward()
            for outputs in everyone:
                entering.append(FeaturePair(outputs["image_keys"], outputs["text_keys"]))
                for name in ("loss/itc", "loss/itm", "loss/lm", "loss/total"):
                    share = outputs[name].item() / (ranks * accumulation)
                    means[name] = means.get(name, 0.0) + share
        losses[step + 1] = means
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, steps_per_epoch)
        if settings.gradient_clip:
            torch.nn.utils.clip_grad_norm_(med.parameters(), settings.gradient_clip)
        optimizer.step()
        with torch.no_grad():
            med.temperature.value.clamp_(0.001, 0.5)
            online = dict(med.named_parameters())
            for name, average in momentum_encoder.named_parameters():
                kept = chosen.objective.momentum
                average.copy_(kept * average + (1 - kept) * online[name])
            for column in range(len(entering) * micro):
                pair, row = entering[column // micro], column % micro
                place = (pointer + column) % queue.image.shape[1]
                queue.image[:, place], queue.text[:, place] = pair.image[row], pair.text[row]
        pointer = (pointer + len(entering) * micro) % queue.image.shape[1]
    return Reference(
        losses,
        {f"med.{name}": p.detach().flatten() for name, p in med.named_parameters()},
        {
            f"med.{name}": p.detach().flatten()
            for name, p in momentum_encoder.named_parameters()
            if online[name].requires_grad  # a frozen weight is its own average, saved once
        },
    )


def _on_all_ranks(
    forward: Callable[[int], dict[str, Tensor]], ranks: int, together: bool
) -> list[dict[str, Tensor]]:
    """Return the results of all ranks, run in sequence or as threads that exchange tensors."""
    if not together:
        return [forward(rank) for rank in range(ranks)]
    with pytest.MonkeyPatch.context() as patches:
        return FakeRanks(ranks, patches).run(forward)


def _loader(
    chosen: recipe.Recipe, tokenizer: object, rank: int, ranks: int, micro: int
) -> TrainLoader:
    position = LoaderPosition(rank, ranks, micro, chosen.train.global_batch_size)
    text = CaptionInput(tokenizer, chosen.model.text.max_tokens)
    return TrainLoader(
        replace(chosen.data, workers=0), chosen.model.vision.image_size, text, chosen.seed, position
    )
