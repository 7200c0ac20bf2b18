"""A process ends as a whole: a thread that fails takes it along, and says why."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
from support import eventually

from millstream.worker.shutdown import Life, Relay, ThreadFailed


class Panic(BaseException):
    """As a library's Rust code raises where it panics: no Exception."""


@pytest.mark.parametrize("error", [RuntimeError("no memory"), Panic("no memory")])
def test_whatever_ends_a_thread_ends_the_process_and_is_named(error: BaseException) -> None:
    life = Life()

    def work() -> None:
        with life.guard():
            raise error

    thread = threading.Thread(target=work, name="claimer")
    thread.start()
    thread.join()

    assert life.draining
    with pytest.raises(ThreadFailed, match=f"claimer failed: {type(error).__name__}: no memory"):
        life.check()


@pytest.fixture
def relay() -> Iterator[tuple[Relay, Life]]:
    """Drains at SIGUSR1."""
    life = Life()
    relay = Relay(life.drain)
    before = signal.signal(signal.SIGUSR1, relay.ring)
    yield relay, life
    signal.signal(signal.SIGUSR1, before)
    relay.close()


def test_a_drain_signal_waits_for_no_lock_of_the_thread_that_it_interrupts(relay: tuple[Relay, Life]) -> None:
    _, life = relay

    # As in the middle of a wait for the begin of draining, or of another drain.
    with life.stopped._cond:  # type: ignore[attr-defined]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not life.draining

    eventually(lambda: life.draining)


def test_signals_that_come_faster_than_they_are_handled_block_nobody(relay: tuple[Relay, Life]) -> None:
    ring, life = relay
    with life.stopped._cond:  # type: ignore[attr-defined]
        for _ in range(100_000):
            ring.ring()

    eventually(lambda: life.draining)
