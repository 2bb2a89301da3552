"""What a run will need, on paper: memory, time, data and storage of a recipe on a cluster."""

from blip_scale.planning.hardware import GPU, GPUS, find_gpu
from blip_scale.planning.plan import GIB, Assumptions, Plan, make_plan
from blip_scale.planning.timing import Cluster

__all__ = ["GIB", "GPU", "GPUS", "Assumptions", "Cluster", "Plan", "find_gpu", "make_plan"]
