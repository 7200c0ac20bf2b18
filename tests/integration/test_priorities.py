"""Priorities with a real worker: nobody starves, not even in a worker's hand."""

from __future__ import annotations

from pathlib import Path

from integration.faults import SERVICE, milling
from support import eventually
from workers import LONG_S

from millstream.broker.queue.pause import pause, resume


def test_bulk_that_a_worker_holds_moves_on_while_realtime_saturates_it(tmp_path: Path, server_binary: Path) -> None:
    shares = {"batch": {"share": 9}}
    with milling(tmp_path, server_binary, forward_s=0.2, batch_size=4, priorities=shares) as mill:
        pause(mill.connection.client, mill.queue.keys)
        bulk = [mill.client.submit(SERVICE, [f"{number}"], priority="batch") for number in range(32)]
        eventually(lambda: mill.queue.depth() == len(bulk))
        resume(mill.connection.client, mill.queue.keys)
        eventually(lambda: len(mill.watch.held()) == len(bulk))

        urgent = [mill.client.submit(SERVICE, [f"{number}"], priority="realtime") for number in range(400)]

        assert [handle.result(LONG_S) for handle in bulk] == [[f"{number}"] for number in range(32)]
        assert not urgent[-1].done()
