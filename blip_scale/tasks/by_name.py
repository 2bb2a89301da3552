"""Registry of tasks by the name in the recipe."""

from __future__ import annotations

import torch

from blip_scale.config.recipe import Recipe
from blip_scale.model.med import MEDConfig
from blip_scale.tasks.base import TrainingTask
from blip_scale.tasks.captioning import Captioning
from blip_scale.tasks.contrast import Contrast
from blip_scale.tasks.contrastive_task import contrast_named
from blip_scale.tasks.nlvr2 import ImagePairs
from blip_scale.tasks.pretrain import Pretrain
from blip_scale.tasks.retrieval import Retrieval
from blip_scale.tasks.visdial import VisualDialog
from blip_scale.tasks.vqa import VisualQuestionAnswering

TASKS: dict[str, type[TrainingTask]] = {
    "pretrain": Pretrain,
    "retrieval": Retrieval,
    "captioning": Captioning,
    "nlvr2": ImagePairs,
    "visdial": VisualDialog,
    "vqa": VisualQuestionAnswering,
}
"""Value of `task` in the recipe -> class of the task."""


def contrast_of(recipe: Recipe, config: MEDConfig) -> Contrast:
    """Create a recipe's contrast on the meta device, to plan memory and FLOPs.

    A task without a contrastive loss also gets the one of `objective.itc`, as in pretraining.

    Raises:
        ValueError: `objective.itc` names no contrast.
    """
    knows_images = getattr(TASKS[recipe.task], "knows_images", False)
    kind = contrast_named(recipe.objective.itc)
    return kind(recipe, config, torch.device("meta"), knows_images)
