"""A process ends as a whole: a thread that fails takes it along, and says why."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
from support import eventually

from millstream.worker.shutdown import Relay, Shutdown, ThreadFailed


class Panic(BaseException):
    """As a library's Rust code raises where it panics: no Exception."""


@pytest.mark.parametrize("error", [RuntimeError("no memory"), Panic("no memory")])
def test_whatever_ends_a_thread_ends_the_process_and_is_named(error: BaseException) -> None:
    shutdown = Shutdown()

    def work() -> None:
        with shutdown.guard():
            raise error

    thread = threading.Thread(target=work, name="claimer")
    thread.start()
    thread.join()

    assert shutdown.draining
    with pytest.raises(ThreadFailed, match=f"claimer failed: {type(error).__name__}: no memory"):
        shutdown.check()


@pytest.fixture
def relay() -> Iterator[tuple[Relay, Shutdown]]:
    """Drains at SIGUSR1."""
    shutdown = Shutdown()
    relay = Relay(shutdown.drain)
    before = signal.signal(signal.SIGUSR1, relay.ring)
    yield relay, shutdown
    signal.signal(signal.SIGUSR1, before)
    relay.close()


def test_a_drain_signal_waits_for_no_lock_of_the_thread_that_it_interrupts(relay: tuple[Relay, Shutdown]) -> None:
    _, shutdown = relay

    # As in the middle of a wait for the begin of draining, or of another drain.
    with shutdown.stopped._cond:  # type: ignore[attr-defined]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not shutdown.draining

    eventually(lambda: shutdown.draining)


def test_signals_that_come_faster_than_they_are_handled_block_nobody(relay: tuple[Relay, Shutdown]) -> None:
    ring, shutdown = relay
    with shutdown.stopped._cond:  # type: ignore[attr-defined]
        for _ in range(100_000):
            ring.ring()

    eventually(lambda: shutdown.draining)
