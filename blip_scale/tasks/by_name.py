"""The tasks that a recipe can name."""

from __future__ import annotations

from blip_scale.tasks.base import TrainingTask
from blip_scale.tasks.captioning import Captioning
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
"""`task` in the recipe -> class of the task."""
