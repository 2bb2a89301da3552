"""What can be trained: name in the recipe -> class of the task."""

from blip_scale.tasks.captioning import Captioning
from blip_scale.tasks.nlvr2 import ImagePairs
from blip_scale.tasks.pretrain import Pretrain
from blip_scale.tasks.retrieval_task import Retrieval
from blip_scale.tasks.training import TrainingTask
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

__all__ = [
    "TASKS",
    "Captioning",
    "ImagePairs",
    "Pretrain",
    "Retrieval",
    "TrainingTask",
    "VisualDialog",
    "VisualQuestionAnswering",
]
