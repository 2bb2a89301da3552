"""All that knows about ranks, processes, time and disks."""

from blip_scale import logs

logs.hold_third_party_noise()  # before torch and DeepSpeed are imported

from blip_scale.engine.loop import run  # noqa: E402
from blip_scale.engine.monitor import Alarm, Panel  # noqa: E402
from blip_scale.engine.task import Evaluation, Progress, Task  # noqa: E402

__all__ = ["Alarm", "Evaluation", "Panel", "Progress", "Task", "run"]
