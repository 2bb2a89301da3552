"""The learning rate of a step, as published."""

from __future__ import annotations

import math

from blip_scale.config.recipe import OptimizerRecipe


def learning_rate(
    optimizer: OptimizerRecipe, step: int, steps_per_epoch: int, epochs: int = 1
) -> float:
    """Learning rate of optimizer step `step` (0-based).

    In pretraining, the rate rises linearly from warmup_lr to peak_lr over the first warmup_steps.
    Then it stays until the end of the first epoch. Later epochs take
    max(min_lr, peak_lr * lr_decay ** epoch). If the first epoch is shorter than the warm-up, its
    end cuts the warm-up, as in the published code (BLIP's train_epoch and step schedule; the
    paper's appendix gives the rates). With `warmup_spans_epochs` the warm-up instead goes on in the
    next epochs, capped by their decayed rate.

    In fine-tuning (`schedule: cosine`), the rate follows half a cosine over the `epochs` of the
    recipe, without warm-up. It is constant within an epoch.
    """
    epoch = step // steps_per_epoch
    if optimizer.schedule == "cosine":
        fall = (1 + math.cos(math.pi * min(epoch / epochs, 1.0))) / 2
        return optimizer.min_lr + (optimizer.peak_lr - optimizer.min_lr) * fall
    warmed = step / max(1, optimizer.warmup_steps)
    warm = optimizer.warmup_lr + (optimizer.peak_lr - optimizer.warmup_lr) * warmed
    if epoch == 0:
        return min(optimizer.peak_lr, warm)
    decayed = max(optimizer.min_lr, optimizer.peak_lr * optimizer.lr_decay**epoch)
    return min(decayed, warm) if optimizer.warmup_spans_epochs else decayed


def warmup_leap(optimizer: OptimizerRecipe, steps_per_epoch: int, total_steps: int) -> str | None:
    """Warning about a warm-up that the end of the first epoch cuts; None if it isn't cut."""
    is_cut = steps_per_epoch < min(optimizer.warmup_steps, total_steps)
    if optimizer.schedule == "cosine" or optimizer.warmup_spans_epochs or not is_cut:
        return None
    before = learning_rate(optimizer, steps_per_epoch - 1, steps_per_epoch)
    after = learning_rate(optimizer, steps_per_epoch, steps_per_epoch)
    return (
        f"optimizer.warmup_steps: {optimizer.warmup_steps} are more than the {steps_per_epoch} "
        f"steps of the first epoch, at whose end the learning rate jumps from {before:.2g} to "
        f"{after:.2g}: set optimizer.warmup_steps={steps_per_epoch} or fewer, or "
        "optimizer.warmup_spans_epochs=true"
    )
