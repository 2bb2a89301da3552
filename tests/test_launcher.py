"""SLURM's way to write how many tasks each node has; the rest is seen on a real SLURM."""

from __future__ import annotations

import pytest

from blip_scale import launcher
from blip_scale.engine.interrupts import REQUEUE_EXIT_CODE


@pytest.mark.parametrize(
    ("written", "tasks"),
    [("8", [8]), ("2(x3)", [2, 2, 2]), ("2(x3),1", [2, 2, 2, 1]), ("1,4(x2)", [1, 4, 4])],
)
def test_tasks_on_node(written: str, tasks: list[int]) -> None:
    assert [launcher.tasks_on_node(written, node) for node in range(len(tasks))] == tasks
    with pytest.raises(ValueError, match="does not reach"):
        launcher.tasks_on_node(written, len(tasks))


def test_one_exit_code_for_a_stop_on_request() -> None:
    assert launcher.NOTHING_LOST == REQUEUE_EXIT_CODE
