"""Ranks from SLURM's and MPI's variables; tests/cluster covers the rest on a real SLURM."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest

from blip_scale import launcher
from blip_scale.errors import RefusedInput


@pytest.mark.parametrize(
    ("written", "tasks"),
    [("8", [8]), ("2(x3)", [2, 2, 2]), ("2(x3),1", [2, 2, 2, 1]), ("1,4(x2)", [1, 4, 4])],
)
def test_tasks_on_node(written: str, tasks: list[int]) -> None:
    assert [launcher.tasks_on_node(written, node) for node in range(len(tasks))] == tasks
    with pytest.raises(ValueError, match=r"does not reach"):
        launcher.tasks_on_node(written, len(tasks))


@pytest.mark.parametrize("written", ["", "2(", "2(x)", "two", "2(x0)x"])
def test_what_is_no_list_of_tasks_is_refused(written: str) -> None:
    with pytest.raises(RefusedInput, match="can't be read"):
        launcher.tasks_on_node(written, 0)


MPI = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE",
                 "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MPICH": ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
    "PALS": ("PMI_RANK", "PALS_LOCAL_RANKID", "PMI_SIZE", "PALS_LOCAL_SIZE"),
    "MVAPICH": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE",
                "MV2_COMM_WORLD_LOCAL_SIZE"),
}  # fmt: skip


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove all launchers' variables from the environment, and restore them afterwards."""
    names = ("RANK", "WORLD_SIZE", "LOCAL", "MASTER_", "SLURM", "OMPI", "PMI", "MPI")
    left = {name: v for name, v in os.environ.items() if not name.startswith(names)}
    monkeypatch.setattr(os, "environ", left)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("kind", MPI)
def test_ranks_of_mpirun_are_adopted(kind: str) -> None:
    values = dict(zip(MPI[kind], ("3", "1", "4", "2"), strict=True))
    os.environ |= values
    with pytest.raises(RefusedInput, match="MASTER_ADDR is not set: mpirun started ranks on sev"):
        launcher.adopt()
    os.environ["MASTER_ADDR"] = "node1"
    launcher.adopt()
    adopted = [
        os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    ]
    assert adopted == ["3", "1", "4", "2"]
    assert launcher.check_variables() == 4


@pytest.mark.usefixtures("bare")
def test_ranks_of_one_job_meet_at_one_port() -> None:
    ports = []
    for job in ("prterun-1", "prterun-1", "prterun-2"):
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        os.environ |= dict(zip(MPI["Open MPI"], ("0", "0", "2", "2"), strict=True))
        os.environ["PMIX_NAMESPACE"] = job
        launcher.adopt()
        assert os.environ["MASTER_ADDR"] == "127.0.0.1"
        ports.append(os.environ["MASTER_PORT"])
    assert ports[0] == ports[1] != ports[2]


@pytest.mark.usefixtures("bare")
def test_one_process_is_one_rank_whatever_mpi_says() -> None:
    os.environ |= {"PMI_SIZE": "1", "PMI_RANK": "0"}
    launcher.adopt()
    assert launcher.check_variables() == 1
    assert "RANK" not in os.environ


def test_a_free_port() -> None:
    """Free ports are below the system's own range; neither they nor their neighbours are in use."""
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
