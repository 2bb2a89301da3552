"""States of the ranks, exchanged through the rendezvous store, to name the rank that hangs."""

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
    """Name of this machine, by SLURM if it runs the rank."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True)
class RankState:
    """Progress of a rank at the time when it published it."""

    rank: int
    node: str
    phase: str
    step: int
    exchanges: int
    """Number of collectives that this rank has begun."""
    data_wait_s: float
    """Time for which this rank has been waiting for its loader; 0 if it is not waiting."""
    pulse: int
    """Number of earlier publications. It stops growing if the process or its machine stops."""


@dataclass(frozen=True)
class Suspect:
    """A rank for which the others wait."""

    rank: int
    node: str
    reason: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}, which {self.reason}"


class Peers:
    """Client of the rendezvous store for the states of all ranks.

    It has its own connection, as the process group's may be blocked. The store runs in rank 0's
    process: if that stops, `read` fails.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        """Connect to the store at MASTER_ADDR.

        Raises:
            RuntimeError: the store can't be reached.
        """
        self.main_node = os.environ["MASTER_ADDR"]
        """Node of rank 0; its address until rank 0 has published its state."""
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
        """Show this rank's state to the others.

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
        """States of the ranks that have published one, or that of rank 0 alone, by rank.

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
        """State of rank 0 while its store does not answer. The pulse is always the same."""
        return RankState(0, self.main_node, "", 0, 0, 0.0, 0)

    def _answer(self, request: Callable[[], T]) -> T:
        """Result of a request to the store.

        The store's client (torch 2.14) waits forever for a server that was stopped, so it does so
        in a thread.
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
    """Counts for how long ranks have given no sign of life.

    It counts ticks of this process, not seconds. If all ranks were suspended together, none counts
    as lost.
    """

    def __init__(self, most_ticks: int) -> None:
        """Begin to count; a rank is lost after `most_ticks` ticks."""
        self._most_ticks = most_ticks
        self._latest: dict[int, RankState] = {}
        self._silent_ticks: Counter[int] = Counter()

    def note(self, states: Mapping[int, RankState]) -> None:
        """Compare states with those of the last call, a tick ago.

        A rank that starts may be silent: imports and compilation can hold the interpreter's lock.
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
    """Whether a rank has not published anything since an earlier reading that has it."""
    return state.rank in before and before[state.rank].pulse == state.pulse


def suspects(before: Mapping[int, RankState], now: Mapping[int, RankState]) -> list[Suspect]:
    """The ranks that all others wait for, from two readings some pulses apart.

    Silent ranks come first. If there are none, it is those that have begun the fewest exchanges.
    Empty if all have begun equally many: the exchange itself hangs.
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
    """The first few suspects as part of a sentence."""
    more = f" and {len(suspected) - _MOST_NAMED} more ranks" * (len(suspected) > _MOST_NAMED)
    return "; ".join(map(str, suspected[:_MOST_NAMED])) + more


def in_words(phase: str, step: int) -> str:
    """A phase, with the steps that were done where they are known."""
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
