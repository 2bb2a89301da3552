"""All that knows about ranks, processes, time and disks."""

from blip_scale.engine.loop import run
from blip_scale.engine.task import Evaluation, Progress, Task

__all__ = ["Evaluation", "Progress", "Task", "run"]
