"""Rendezvous of the ranks, and the addresses on which a run listens.

By default PyTorch's store listens on every address of rank 0's machine, and gloo and NCCL listen on
an interface that they choose. Anyone who reaches such a port can write into the run. Here the store
listens on MASTER_ADDR alone, and each rank uses the interface that leads there.
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
"""Scheme of `init_method` (`bound://`) that selects this module's rendezvous."""
_BACKLOG = 2048
_AGENTS_STORE = "TORCHELASTIC_USE_AGENT_STORE"
_RDMA_DEVICES = Path("/sys/class/infiniband")


def exchange_on_the_rendezvous_interface() -> None:
    """Make gloo and NCCL listen on the interface through which this rank reaches MASTER_ADDR.

    GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME are left alone if set. Between machines without RDMA,
    NCCL chooses its interface itself: its sockets carry the gradients, and it knows the fastest
    network.
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
    """Name of the interface that leads to a host, and whether it is the loopback.

    None if no interface leads there.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # connecting a datagram socket sends nothing
            here = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == here for address in addresses):
            return name, here == "::1" or here.startswith("127.")
    # All of 127.0.0.0/8 is the loopback, but only 127.0.0.1 is listed.
    return ("lo", True) if here.startswith("127.") else None


def _others_may_mean_another_address(host: str) -> bool:
    """Whether other nodes may resolve a host name to another address than this node does.

    Debian's /etc/hosts maps the machine's own name to 127.0.1.1, which means something else on
    every node.
    """
    if host in ("localhost", "::1") or host.startswith("127."):
        return False
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    is_one_node = os.environ["WORLD_SIZE"] in ("1", here)
    return not is_one_node


def _meet(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Store, int, int]]:
    """Rendezvous handler like torch's `env://`, but rank 0 listens on the socket of `_listen`."""
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

    None if the port is taken: by this process, whose store is then shared, or by another process,
    which torch reports. Also None if `host` is no address of this machine (a forwarded one) or
    other nodes can't reach it. The store then listens on all addresses, with a warning.
    """
    sockets = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    may_mislead = _others_may_mean_another_address(host)
    for family, kind, _, _, address in sockets:
        if may_mislead and str(address[0]).startswith(("127.", "::1")):
            continue
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
        "MASTER_ADDR %s is not an address at which others reach this machine: listening on all",
        host,
    )
    return None
