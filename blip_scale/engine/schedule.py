"""The learning rate of a step, as published."""

from __future__ import annotations

import math

from blip_scale.config.recipe import OptimizerRecipe


def learning_rate(
    optimizer: OptimizerRecipe, step: int, steps_per_epoch: int, epochs: int = 1
) -> float:
    """Learning rate of optimizer step `step` (0-based).

    Pretraining: in the first epoch it rises linearly from warmup_lr to peak_lr over warmup_steps
    and then stays; the later epochs take max(min_lr, peak_lr * lr_decay ** epoch). A first epoch
    shorter than the warm-up cuts it, as in the published code (BLIP's train_epoch and step
    schedule; the paper's appendix gives the rates).

    Fine-tuning (`schedule: cosine`): half a cosine over the `epochs` of the recipe, constant
    through an epoch, without warm-up.
    """
    epoch = step // steps_per_epoch
    if optimizer.schedule == "cosine":
        fall = (1 + math.cos(math.pi * min(epoch / epochs, 1.0))) / 2
        return optimizer.min_lr + (optimizer.peak_lr - optimizer.min_lr) * fall
    if epoch == 0:
        warmed = step / max(1, optimizer.warmup_steps)
        rise = (optimizer.peak_lr - optimizer.warmup_lr) * warmed
        return min(optimizer.peak_lr, optimizer.warmup_lr + rise)
    return max(optimizer.min_lr, optimizer.peak_lr * optimizer.lr_decay**epoch)
