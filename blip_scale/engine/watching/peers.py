"""Exchange of rank states through the rendezvous store, to identify the rank that hangs."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TypeVar

from torch.distributed import TCPStore

_STORE_TIMEOUT_S = 2.0
_MOST_NAMED = 4
_NO_SIGN = "gives no sign of life; last seen"

T = TypeVar("T")


def node_name() -> str:
    """Return the name of this node: the SLURM name if it is set, else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True)
class RankState:
    """Progress of a rank when it published this state."""

    rank: int
    node: str
    phase: str
    step: int
    exchanges: int
    """Number of collectives that this rank has begun."""
    data_wait_s: float
    """Time spent in the current wait for the loader; 0 if the rank is not waiting."""
    pulse: int
    """Number of earlier publications. It stops growing if the process or its machine stops."""


@dataclass(frozen=True)
class Suspect:
    """A rank that the others probably wait for."""

    rank: int
    node: str
    reason: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}, which {self.reason}"


class Peers:
    """Client of the rendezvous store for the states of all ranks.

    The client has a separate connection, because the process group's connection may be blocked.
    The store runs in the process of rank 0, so `read` fails if that process stops.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        """Connect to the store at MASTER_ADDR.

        Raises:
            RuntimeError: the store cannot be reached.
        """
        self.main_node = os.environ["MASTER_ADDR"]
        """Node of rank 0. MASTER_ADDR until rank 0 has published its state."""
        self._keys = [f"blip_scale/state/{peer}" for peer in range(world_size)]
        self._key = self._keys[rank]
        self._published: set[str] = set()
        self._knows_main_node = False
        self._request = threading.Thread()
        self._store = TCPStore(
            self.main_node, int(os.environ["MASTER_PORT"]), world_size,
            is_master=False, wait_for_workers=False,
            timeout=timedelta(seconds=_STORE_TIMEOUT_S),
        )  # fmt: skip

    def publish(self, state: RankState) -> None:
        """Publish the state of this rank.

        Raises:
            RuntimeError: the store does not answer.
        """

        def publish() -> None:
            self._store.set(self._key, json.dumps(asdict(state)))
            if not self._knows_main_node and self._store.check(self._keys[:1]):
                self.main_node = _parsed(self._store.get(self._keys[0])).node
                self._knows_main_node = True

        self._answer(publish)

    def read(self, only_main: bool = False) -> dict[int, RankState]:
        """Return the published states by rank.

        Args:
            only_main: read only the state of rank 0.

        Raises:
            RuntimeError: the store does not answer.
        """

        def read() -> list[RankState]:
            keys = self._keys[:1] if only_main else self._keys
            missing = [key for key in keys if key not in self._published]
            self._published |= {key for key in missing if self._store.check([key])}
            published = [key for key in keys if key in self._published]
            return [_parsed(text) for text in self._store.multi_get(published)]

        return {state.rank: state for state in self._answer(read)}

    def silent_main(self) -> RankState:
        """Return a state for rank 0 whose store does not answer. Its pulse never changes."""
        return RankState(0, self.main_node, "", 0, 0, 0.0, 0)

    def _answer(self, request: Callable[[], T]) -> T:
        """Return the result of a request to the store.

        The request runs in a thread, because TCPStore (torch 2.14) waits forever for a stopped
        server.
        """
        answers: list[T] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(request())

        if not self._request.is_alive():
            self._request = threading.Thread(target=ask, name="peers", daemon=True)
            self._request.start()
            self._request.join(_STORE_TIMEOUT_S)
        if not answers:
            raise RuntimeError(f"the store of rank 0 on {self.main_node} does not answer")
        return answers[0]


class RollCall:
    """Counter of the time since each rank last published a new state.

    The time is counted in ticks of this process, not in seconds. If all ranks are suspended
    together, none of them counts as lost.
    """

    def __init__(self, most_ticks: int) -> None:
        """Start the counter. A rank counts as lost after `most_ticks` ticks without a new state."""
        self._most_ticks = most_ticks
        self._latest: dict[int, RankState] = {}
        self._silent_ticks: Counter[int] = Counter()

    def note(self, states: Mapping[int, RankState]) -> None:
        """Compare states with those of the previous call. Call once per tick.

        A rank in phase `starting` may be silent, because imports and compilation can hold the GIL.
        """
        for rank, state in states.items():
            if state.phase == "starting" or not is_silent(state, self._latest):
                self._silent_ticks[rank] = 0
            else:
                self._silent_ticks[rank] += 1
            self._latest[rank] = state

    def lost(self) -> list[Suspect]:
        """Return the lost ranks."""
        return [
            _suspect(self._latest[rank], _NO_SIGN)
            for rank, ticks in self._silent_ticks.items()
            if ticks >= self._most_ticks
        ]


def is_silent(state: RankState, before: Mapping[int, RankState]) -> bool:
    """Return True if a rank in `before` has not published a new state since then."""
    return state.rank in before and before[state.rank].pulse == state.pulse


def suspects(before: Mapping[int, RankState], now: Mapping[int, RankState]) -> list[Suspect]:
    """Identify the ranks that the others wait for, from two readings several pulses apart.

    Return the silent ranks. If there are none, return the ranks that have begun the fewest
    collectives. If all ranks have begun the same number, return an empty list: the collective
    itself hangs.
    """
    silent = [state for state in now.values() if is_silent(state, before)]
    if silent:
        return [_suspect(state, _NO_SIGN) for state in silent]
    fewest = min((state.exchanges for state in now.values()), default=0)
    behind = [state for state in now.values() if state.exchanges == fewest]
    if len(behind) == len(now):
        return []
    return [_suspect(state, "is behind the others") for state in behind]


def named(suspected: Sequence[Suspect]) -> str:
    """Format the first few suspects as part of a sentence."""
    more = f" and {len(suspected) - _MOST_NAMED} more ranks" * (len(suspected) > _MOST_NAMED)
    return "; ".join(map(str, suspected[:_MOST_NAMED])) + more


def in_words(phase: str, step: int) -> str:
    """Format a phase and, if known, the number of completed steps."""
    if phase == "starting":  # the checkpoint may not be loaded yet
        return phase
    return f"{'ending' if phase in ('stopped', 'done') else phase}, {step} steps done"


def _suspect(state: RankState, reason: str) -> Suspect:
    waits = f", waiting for data for {state.data_wait_s:.0f} s" if state.data_wait_s else ""
    where = f"{in_words(state.phase, state.step)}{waits}"
    if not state.phase:
        where = "its store of the ranks' states does not answer"
    return Suspect(state.rank, state.node, f"{reason} ({where})")


def _parsed(text: bytes) -> RankState:
    return RankState(**json.loads(text))
