"""What can be trained: name in the recipe -> class of the task."""

from blip_scale.tasks.captioning import Captioning
from blip_scale.tasks.pretrain import Pretrain
from blip_scale.tasks.retrieval_task import Retrieval
from blip_scale.tasks.training import TrainingTask

TASKS: dict[str, type[TrainingTask]] = {
    "pretrain": Pretrain,
    "retrieval": Retrieval,
    "captioning": Captioning,
}

__all__ = ["TASKS", "Captioning", "Pretrain", "Retrieval", "TrainingTask"]
