"""All ranks agree on the signals received so far. A second Ctrl-C stops at once."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

import pytest

from blip_scale.config import exit_codes
from blip_scale.engine.interrupts import Interrupts, StopRequested


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    watching = Interrupts()
    yield watching
    watching.restore()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_is_noted(
    name: str, interrupts: Interrupts, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="blip_scale")
    assert not interrupts.is_pending
    os.kill(os.getpid(), signal.Signals[name])
    assert interrupts.received == name
    assert interrupts.is_pending
    assert not caplog.messages
    interrupts.announce()
    assert caplog.messages == [f"{name}: stopping after this step"]


def test_a_second_ctrl_c_stops_at_once(interrupts: Interrupts) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_after_another_signal_is_the_first_one(interrupts: Interrupts) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert interrupts.received == "SIGINT"


def test_a_signal_of_another_rank_is_announced(
    interrupts: Interrupts, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="blip_scale")
    interrupts.announce()
    assert caplog.messages == ["a signal on another rank: stopping after this step"]


def test_where_all_is_saved_a_signal_stops_at_once(interrupts: Interrupts) -> None:
    with pytest.raises(StopRequested, match="SIGTERM"), interrupts.stopping_at_once():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")
    os.kill(os.getpid(), signal.SIGUSR1)  # outside the context, a signal is only recorded


def test_a_signal_while_a_line_is_logged_stops_at_once(interrupts: Interrupts) -> None:
    """The stop is no `Exception`, because `logging` swallows every `Exception` of its handlers."""

    class Interrupted(logging.StreamHandler):
        def format(self, record: logging.LogRecord) -> str:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().format(record)

    logger = logging.Logger("interrupted")
    logger.addHandler(Interrupted())
    with pytest.raises(StopRequested, match="SIGTERM"), interrupts.stopping_at_once():
        logger.warning("evaluating")
        pytest.fail("it went on")


def test_a_signal_from_before_stops_there_too(interrupts: Interrupts) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(StopRequested), interrupts.stopping_at_once():
        pytest.fail("it went on")


def test_only_with_a_signal_an_error_is_a_stop(interrupts: Interrupts) -> None:
    """A collective fails if another rank left it because of a signal."""
    with pytest.raises(RuntimeError, match="closed"), interrupts.stopping_at_once():
        raise RuntimeError("connection closed")
    with pytest.raises(StopRequested), interrupts.stopping_at_once():
        interrupts.received = "SIGTERM"
        raise RuntimeError("connection closed")


def test_signals_are_given_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    Interrupts().restore()
    assert {number: signal.getsignal(number) for number in before} == before


def test_the_exit_code_asks_for_another_try() -> None:
    assert exit_codes.REQUEUE == os.EX_TEMPFAIL
