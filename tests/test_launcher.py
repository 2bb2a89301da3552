"""SLURM's way to write how many tasks each node has; the rest is seen on a real SLURM."""

from __future__ import annotations

import contextlib
import socket

import pytest

from blip_scale import launcher


@pytest.mark.parametrize(
    ("written", "tasks"),
    [("8", [8]), ("2(x3)", [2, 2, 2]), ("2(x3),1", [2, 2, 2, 1]), ("1,4(x2)", [1, 4, 4])],
)
def test_tasks_on_node(written: str, tasks: list[int]) -> None:
    assert [launcher.tasks_on_node(written, node) for node in range(len(tasks))] == tasks
    with pytest.raises(ValueError, match="does not reach"):
        launcher.tasks_on_node(written, len(tasks))


def test_a_free_port() -> None:
    """Below those that systems hand out; one that is taken, or whose neighbour is, is not given."""
    taken = {launcher.free_port(1) for _ in range(50)}
    assert all(10_000 <= port < 29_999 for port in taken)
    with contextlib.ExitStack() as stack:
        listening = 0
        for port in range(10_000, 30_000, 2):
            with contextlib.suppress(OSError):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                listening += 1
            if listening == 500:
                break
        for _ in range(100):
            port = launcher.free_port(1)
            assert port >= 10_000 + 2 * 500 - 1
