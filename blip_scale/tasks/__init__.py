"""What can be trained: name in the recipe -> function that builds the task."""

from blip_scale.tasks.pretrain import Pretrain

TASKS = {"pretrain": Pretrain}

__all__ = ["TASKS", "Pretrain"]
