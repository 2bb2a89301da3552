"""Network addresses on which a run listens."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_runs import fork_server

from blip_scale import launcher
from blip_scale.engine import rendezvous

REPO = Path(__file__).resolve().parents[2]
RANK = Path(__file__).with_name("listening_rank.py")


def other_addresses() -> list[str]:
    """IPv4 addresses of this machine other than loopback."""
    listed = [a for addresses in psutil.net_if_addrs().values() for a in addresses]
    ipv4 = [a.address for a in listed if a.family == socket.AF_INET]
    return [address for address in ipv4 if not address.startswith("127.")]


def listened(address: str, folder: Path) -> list[list[str]]:
    """Addresses on which two ranks listen whose MASTER_ADDR is `address`."""
    port = str(launcher.free_port())
    ranks = []
    for rank in ("0", "1"):
        environment = os.environ | {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": address, "MASTER_PORT": port, "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            environment.pop(name, None)
        with (folder / f"rank_{rank}").open("w") as output:
            ranks.append(fork_server().start([str(RANK)], environment, REPO, output))
    for process in ranks:
        process.wait(400)
    addresses: list[list[str]] = json.loads((folder / "rank_0").read_text().splitlines()[-1])
    return addresses


@pytest.mark.multiprocess
@pytest.mark.parametrize("place", ["loopback", "network"])
def test_ranks_listen_where_they_meet(place: str, tmp_path: Path) -> None:
    addresses = ["127.0.0.1"] if place == "loopback" else other_addresses()
    if not addresses:
        pytest.skip("this machine has the loopback alone")
    listening = listened(addresses[0], tmp_path)
    assert len(listening) == 2 and len(listening[0]) >= 2, "the store, and gloo on both ranks"
    assert {address for rank in listening for address in rank} == {addresses[0]}


def test_the_interface_on_the_way() -> None:
    assert rendezvous.interface_to("127.0.0.1", 1) == ("lo", True)
    assert rendezvous.interface_to("127.0.1.1", 1) == ("lo", True)
    assert rendezvous.interface_to("no-such-host.invalid", 1) is None


def test_chosen_interfaces_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    rendezvous.exchange_on_the_rendezvous_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "lo"


def test_an_address_of_another_machine_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rendezvous._listen("192.0.2.77", launcher.free_port()) is None
    assert "192.0.2.77 is not an address at which others reach this machine" in caplog.text


def test_a_name_that_is_the_loopback_here_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """/etc/hosts often maps a machine's name to 127.0.1.1, which other nodes cannot reach."""
    name = "this-very-node"
    asked = socket.getaddrinfo

    def answered(host: str, *more: Any, **options: Any) -> Any:
        return asked("127.0.1.1" if host == name else host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", answered)
    for variable, value in {"MASTER_ADDR": name, "MASTER_PORT": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(variable, value)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    rendezvous.exchange_on_the_rendezvous_interface()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    assert rendezvous._listen(name, launcher.free_port()) is None
    assert "listening on all" in caplog.text
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    rendezvous.exchange_on_the_rendezvous_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    descriptor = rendezvous._listen(name, launcher.free_port())
    assert descriptor is not None
    with socket.socket(fileno=descriptor) as listening:
        assert listening.getsockname()[0] == "127.0.1.1"
