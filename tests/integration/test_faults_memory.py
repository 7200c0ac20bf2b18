"""A server that lost its scripts, is out of memory, or cannot write to its disk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from integration.faults import SERVICE, THREADS, Mill, frozen, let_pass, milling, unwritable
from support import eventually
from workers import LONG_S

from millstream.broker.contract.errors import BrokerUnavailable, MillstreamError, QueueFull
from millstream.broker.contract.keys import GROUP
from millstream.broker.queue.pause import pause, resume
from millstream.client.handle import Handle

BODY = "x" * 100_000


def outcome(handle: Handle) -> object:
    """A call's result, or its error."""
    try:
        return handle.result(LONG_S)
    except MillstreamError as error:
        return error


# -- scripts that are gone -----------------------------------------------------------------------------------------


def test_calls_do_not_notice_that_the_server_forgets_its_scripts(tmp_path: Path, server_binary: Path) -> None:
    with milling(tmp_path, server_binary, workers=2, forward_s=0.005, batch_size=4) as mill:
        with mill.called() as callers:
            until = time.monotonic() + 3.0
            while time.monotonic() < until:
                mill.connection.client.script_flush()
                callers.go_on(5)
            assert mill.most_attempts_until(callers, 50) == 0

        mill.ran_once_each(callers.answered)


# -- no memory left ------------------------------------------------------------------------------------------------


def test_a_full_server_refuses_new_jobs_until_workers_have_drained_it(tmp_path: Path, server_binary: Path) -> None:
    with milling(tmp_path, server_binary, max_batch_tokens=100_000) as mill:
        client = mill.connection.client
        mill.client.submit(SERVICE, ["warm"]).result()
        pause(client, mill.queue.keys)
        memory = int(client.info("memory")["used_memory"]) + 4_000_000
        client.config_set("maxmemory", memory)

        accepted = list(until_refused(mill))
        # What the server gives back by itself (buffers of connections) makes no room.
        client.config_set("maxmemory", memory - 1_000_000)
        refused = mill.client.submit(SERVICE, [BODY], wait=False)
        error = outcome(refused)
        patient = mill.client.submit(SERVICE, [BODY])
        mill.beaten()
        assert isinstance(error, QueueFull)
        assert error.retry_after
        assert error.hint == "drain the queue or raise the server's maxmemory"
        assert not patient.done()
        assert mill.queue.depth() == len(accepted) > 5

        resume(client, mill.queue.keys)

        assert [outcome(handle) for handle in accepted] == [[BODY]] * len(accepted)
        assert outcome(patient) == [BODY]
        mill.ran_once_each(len(accepted) + 2)


def until_refused(mill: Mill) -> Iterator[Handle]:
    """Calls that the server accepted, one by one, until it had no memory for the next."""
    while True:
        handle = mill.client.submit(SERVICE, [BODY], wait=False)
        if not is_accepted(mill, handle):
            return
        yield handle


def is_accepted(mill: Mill, handle: Handle) -> bool:
    """What the server said to a call of one job."""
    seen = mill.queue.keys.seen(handle.id)
    eventually(lambda: handle.ready or mill.connection.client.exists(seen))
    return not handle.ready


def test_on_a_full_server_what_a_lost_worker_held_is_still_given_back(tmp_path: Path, server_binary: Path) -> None:
    with milling(tmp_path, server_binary) as mill:
        pause(mill.connection.client, mill.queue.keys)
        handle = mill.client.submit(SERVICE, ["a"])
        eventually(lambda: mill.queue.depth() == 1)
        hold_as(mill, "lost")
        mill.connection.client.config_set("maxmemory", 1)

        resume(mill.connection.client, mill.queue.keys)

        assert outcome(handle) == ["a"]
        mill.ran_once_each(1)
        mill.connection.client.config_set("maxmemory", 0)


def hold_as(mill: Mill, consumer: str) -> None:
    """All that waits is held by a worker that was never heard of again."""
    for stream in mill.queue.keys.streams():
        mill.connection.client.xreadgroup(GROUP, consumer, {stream: ">"})


# -- a disk that cannot be written ---------------------------------------------------------------------------------


def test_while_the_server_cannot_write_its_disk_callers_are_told_and_results_are_kept(
    tmp_path: Path, server_binary: Path
) -> None:
    with milling(tmp_path, server_binary, forward_s=1.0, batch_size=THREADS) as mill, ExitStack() as ends:
        handles = held_at_once(mill, THREADS)
        ends.enter_context(frozen(*mill.supervisor.pids))
        with unwritable(mill):
            ends.close()
            error = outcome(mill.client.submit(SERVICE, ["refused"], wait=False))
            patient = mill.client.submit(SERVICE, ["patient"])
            let_pass(2.0)
            assert not any(handle.done() for handle in [*handles, patient])

        assert isinstance(error, BrokerUnavailable)
        assert "cannot write to its disk" in str(error)
        assert error.hint == "free disk space and see its log"
        assert [outcome(handle) for handle in handles] == [[f"{number}"] for number in range(THREADS)]
        assert outcome(patient) == ["patient"]
        mill.ran_once_each(THREADS + 1)


def held_at_once(mill: Mill, calls: int) -> list[Handle]:
    """Calls that a worker has claimed together, and runs in one forward."""
    client, keys = mill.connection.client, mill.queue.keys
    pause(client, keys)
    handles = [mill.client.submit(SERVICE, [f"{number}"]) for number in range(calls)]
    eventually(lambda: mill.queue.depth() == calls)
    resume(client, keys)
    eventually(lambda: len(mill.watch.held()) == calls)
    return handles
