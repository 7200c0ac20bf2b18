"""What a server delivers to a connection that was cut is neither lost nor stuck on a live worker's name."""

from __future__ import annotations

import os
import signal

from contracts.queue import draft
from support import eventually
from workers import LONG_S, spec, working

from millstream.broker.contract.job import Priority
from millstream.broker.contract.keys import GROUP, ServiceKeys
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.stream_types import Group
from millstream.broker.queue.streams import Streams
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection


def asleep(connection: Connection) -> bool:
    """Whether some worker's connection is blocked in a read."""
    return any("b" in client["flags"] and client["cmd"] == "xreadgroup" for client in connection.client.client_list())


def test_a_job_delivered_behind_its_workers_back_is_answered(
    server: EmbeddedServer, connection: Connection, service: str
) -> None:
    keys = ServiceKeys(service)
    streams = Streams(connection.client, keys)
    with working(server.url, spec(service)) as supervisor:
        inspector = Inspector(connection)
        eventually(lambda: inspector.services([service])[0].workers, within_s=LONG_S)
        (worker,) = inspector.services([service])[0].workers
        os.kill(worker.pid, signal.SIGSTOP)
        eventually(lambda: not asleep(connection))
        streams.enqueue([Group(Priority.NORMAL, [draft()])])
        connection.client.xreadgroup(GROUP, worker.consumer, dict.fromkeys(keys.streams(), ">"), count=1)

        os.kill(worker.pid, signal.SIGCONT)

        eventually(lambda: not connection.client.xlen(keys.stream(Priority.NORMAL)))
        assert supervisor.restarts == 0
    connection.client.srem("ms:services", service)
