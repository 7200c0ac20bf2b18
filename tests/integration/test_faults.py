"""A server that is frozen, cut off, full of connections, loading or a replica for a while: callers and workers wait."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import redis
from engines import crash
from integration.faults import SERVICE, Mill, frozen, let_pass, milling
from support import eventually

from millstream.broker.contract.errors import BrokerUnavailable
from millstream.client import Client

pytestmark = pytest.mark.early

FAULT_S = 2.0
"""How long a fault lasts that has no length of its own."""


@pytest.mark.parametrize("seconds", [0.3, 2.0, 8.0] if os.environ.get("MILLSTREAM_LONG") else [0.3, 8.0])
def test_calls_outlast_a_frozen_server_and_each_runs_once(tmp_path: Path, server_binary: Path, seconds: float) -> None:
    with milling(tmp_path, server_binary, workers=2, forward_s=0.02, batch_size=4) as mill:
        with mill.called(threads=32) as callers:
            with frozen(mill.server.pid):
                let_pass(seconds)
            assert mill.most_attempts_until(callers, 200) == 0

        mill.ran_once_each(callers.answered)


def test_after_a_freeze_of_everything_nothing_is_taken_from_the_worker_that_wakes_last(
    tmp_path: Path, server_binary: Path
) -> None:
    with milling(tmp_path, server_binary, workers=2, forward_s=0.1, batch_size=4) as mill:
        with mill.called(threads=32) as callers:
            mill.beaten()
            (early, early_pid), (_, late_pid) = mill.watch.live().items()
            with frozen(late_pid):
                with frozen(mill.server.pid, early_pid):
                    let_pass(8.0)
                mill.beaten_by(early)
                mill.beaten_by(early)
            assert mill.most_attempts_until(callers, 200) == 0

        mill.ran_once_each(callers.answered)


def test_calls_outlast_connections_that_are_cut_again_and_again(tmp_path: Path, server_binary: Path) -> None:
    with milling(tmp_path, server_binary, workers=2, forward_s=0.005, batch_size=4) as mill:
        with mill.called() as callers:
            until, cuts = time.monotonic() + 4.0, 0
            while time.monotonic() < until:
                cuts += mill.cut()
                let_pass(0.02)
            assert mill.most_attempts_until(callers, 200) == 0

        assert cuts > 50
        mill.ran_once_each(callers.answered)


def test_where_no_connection_is_left_calls_wait_and_new_clients_are_told(tmp_path: Path, server_binary: Path) -> None:
    with milling(tmp_path, server_binary, forward_s=0.005, batch_size=4) as mill:
        client = mill.connection.client
        allowed = str(client.config_get("maxclients")["maxclients"])
        with mill.called() as callers:
            client.config_set("maxclients", 1)
            mill.cut()
            # Now and then the server has hung up before its reason could be read.
            eventually(lambda: told(mill) == "raise its maxclients")
            let_pass(FAULT_S)
            client.config_set("maxclients", allowed)

        mill.ran_once_each(callers.answered)


def told(mill: Mill) -> str | None:
    """The hint that a client gets whose first call this is."""
    with Client(mill.server.url) as newcomer, pytest.raises(BrokerUnavailable) as caught:
        newcomer.submit(SERVICE, ["a"])
    return caught.value.hint


def test_while_the_server_is_a_replica_calls_wait_and_then_go_on(tmp_path: Path, server_binary: Path) -> None:
    with milling(tmp_path, server_binary, workers=2, forward_s=0.005, batch_size=4) as mill:
        with mill.called() as callers:
            mill.demote()
            with pytest.raises(BrokerUnavailable, match="read-only replica"):
                mill.client.submit(SERVICE, ["refused"], wait=False).result()
            let_pass(FAULT_S)
            mill.promote()
            assert mill.most_attempts_until(callers, 100) == 0

        mill.ran_once_each(callers.answered)


def test_workers_that_sleep_outlast_a_server_that_turns_into_a_replica(tmp_path: Path, server_binary: Path) -> None:
    with milling(tmp_path, server_binary) as mill:
        client = mill.connection.client
        eventually(lambda: client.info("clients")["blocked_clients"])

        mill.demote()
        let_pass(FAULT_S)
        mill.promote()

        assert mill.client.submit(SERVICE, ["a"]).result() == ["a"]
        mill.ran_once_each(1)


def test_calls_wait_for_a_server_that_loads_its_data(tmp_path: Path, server_binary: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text(f'#!/bin/sh\nexec {server_binary} "$@" --key-load-delay 1000\n')
    slow.chmod(0o755)
    with milling(tmp_path, slow, workers=2, forward_s=0.005, batch_size=4) as mill:
        filler = mill.connection.client.pipeline(transaction=False)
        for number in range(2_000):
            filler.set(f"filler:{number}", number)
        filler.execute()
        with mill.called() as callers:
            crash(mill.server)
            restart = threading.Thread(target=mill.server.restart)
            restart.start()
            eventually(lambda: loads(mill))
            restart.join()
            assert mill.most_attempts_until(callers, 100) == 0

        assert mill.supervisor.restarts == 0
        assert mill.watch.held() == []


def loads(mill: Mill) -> bool:
    """Whether the server answers that it is loading."""
    try:
        mill.connection.client.get("filler:0")
    except redis.exceptions.BusyLoadingError:
        return True
    except redis.exceptions.ConnectionError:
        return False
    return False
