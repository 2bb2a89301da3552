"""Where ranks meet, and on which addresses a run listens.

PyTorch's store listens on every address of rank 0's machine, and gloo and NCCL on an interface that
they choose. Whoever reaches such a port can write into the run. Here the store listens on
MASTER_ADDR alone, and each rank exchanges on the interface that leads there.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
from torch.distributed import Store, TCPStore, register_rendezvous_handler

logger = logging.getLogger(__name__)

SCHEME = "bound"
"""Of `init_method` (`bound://`): this module's rendezvous."""
_BACKLOG = 2048
_AGENTS_STORE = "TORCHELASTIC_USE_AGENT_STORE"
_RDMA_DEVICES = Path("/sys/class/infiniband")


def exchange_on_the_rendezvous_interface() -> None:
    """Have gloo and NCCL listen on the interface through which this rank reaches MASTER_ADDR.

    GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME that are set stay. NCCL keeps its choice between
    machines without RDMA: its sockets carry the gradients there, and it knows the fastest network.
    """
    host = os.environ["MASTER_ADDR"]
    interface = interface_to(host, int(os.environ["MASTER_PORT"]))
    if interface is None:
        return
    name, is_loopback = interface
    if is_loopback and _others_may_mean_another_address(host):
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if is_loopback or (_RDMA_DEVICES.is_dir() and any(_RDMA_DEVICES.iterdir())):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def interface_to(host: str, port: int) -> tuple[str, bool] | None:
    """Name of the interface on the way to a host, and whether it is the loopback; None where there
    is no way."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # of a datagram socket: nothing is sent
            here = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == here for one in addresses):
            return name, here == "::1" or here.startswith("127.")
    # The whole of 127.0.0.0/8 is the loopback's, though only 127.0.0.1 is listed.
    return ("lo", True) if here.startswith("127.") else None


def _others_may_mean_another_address(host: str) -> bool:
    """Whether a name that is the loopback's here leads other nodes to this machine's network:
    Debian's /etc/hosts has the machine's own name as 127.0.1.1."""
    is_literal = host == "localhost" or host.startswith("127.") or host == "::1"
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    is_one_node = os.environ["WORLD_SIZE"] in ("1", here)
    return not is_literal and not is_one_node


def _meet(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Store, int, int]]:
    """As torch's `env://`, with a listening socket of our own on rank 0."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    listens = rank == 0 and os.environ.get(_AGENTS_STORE) != "True"
    more: dict[str, Any] = {"multi_tenant": True}
    descriptor = _listen(host, port) if listens else None
    if descriptor is not None:
        more = {"master_listen_fd": descriptor}
    yield TCPStore(host, port, size, is_master=listens, timeout=timeout, **more), rank, size


register_rendezvous_handler(SCHEME, _meet)


def _listen(host: str, port: int) -> int | None:
    """A listening socket on an address of this machine, as a file descriptor that the caller owns.

    None where the port is taken: by this process, whose store is shared, or by another, which torch
    reports. None, too, where the address is none of this machine's (a forwarded one), or other
    nodes don't reach it: then the store listens on all, and the log says so.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if _others_may_mean_another_address(host):
        found = [one for one in found if not str(one[4][0]).startswith(("127.", "::1"))]
    for family, kind, _, _, address in found:
        with contextlib.ExitStack() as stack:
            listening = stack.enter_context(socket.socket(family, kind))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listening.bind(address)
                listening.listen(_BACKLOG)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return None
                continue
            return listening.detach()
    logger.warning(
        "MASTER_ADDR %s is no address at which others reach this machine: listening on all", host
    )
    return None
