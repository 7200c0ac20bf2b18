"""Thread that sends the heartbeats of a pool's services whose models are not in memory.

Such a worker lives, so callers wait for it, but it is not ready: others do not leave a part of the jobs to it.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Mapping, Sequence

from millstream.broker.queue.lease import Lease
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.streams import Streams
from millstream.broker.transport.connection import Connection, is_missing_group, is_transient
from millstream.worker.intake.heartbeat import EVERY_S
from millstream.worker.pool.member import Member
from millstream.worker.shutdown import Shutdown
from millstream.worker.supervision.child_args import ChildArgs

log = logging.getLogger(__name__)


class Standby(threading.Thread):
    """Beats for each member that is on standby or being loaded, until `stop`."""

    def __init__(
        self, child_args: ChildArgs, connection: Connection, members: Sequence[Member], shutdown: Shutdown
    ) -> None:
        super().__init__(name="standby", daemon=True)
        self._child_args = child_args
        self._connection = connection
        self._registry = Registry(connection, child_args.prefix)
        self._members = members
        self._shutdown = shutdown
        self._unknown: dict[str, set[str]] = {}
        self._due = threading.Event()
        self._stopped = False

    def beat_soon(self) -> None:
        """Makes the thread beat now, to publish a changed state."""
        self._due.set()

    def stop(self) -> None:
        self._stopped = True
        self._due.set()

    def run(self) -> None:
        with self._shutdown.guard():
            while not self._stopped:
                for member in self._members:
                    if member.state in ("standby", "loading"):
                        self._try(member)
                self._due.wait(EVERY_S)
                self._due.clear()

    def leave(self, member: Member) -> None:
        """Gives back what was delivered to this process for a service, and says that it works for it no more."""
        try:
            self._lease(member).release(self._child_args.consumer, gone=True)
        except Exception as error:
            if not is_transient(error):
                raise

    def _try(self, member: Member) -> None:
        try:
            self._beat(member)
        except Exception as error:
            if is_missing_group(error):
                keys = self._registry.keys(member.spec.name)
                Streams(self._connection.client, keys, result_ttl_ms=0).create_groups()
            elif not is_transient(error):
                raise
            log.debug("beat of %s: %s", member.spec.name, error)

    def _beat(self, member: Member) -> None:
        lease, consumer, name = self._lease(member), self._child_args.consumer, member.spec.name
        beat = lease.beat(consumer, self._status(member), ())
        if member.state not in ("standby", "loading"):
            return
        # Delivered to a connection that was cut, while the model was in memory. The lane itself needs two beats, too.
        again = self._unknown.get(name, set()).intersection(beat.unknown)
        self._unknown[name] = set(beat.unknown)
        if again:
            lease.release(consumer, only=again)
        if beat.reclaim_due and (returned := lease.reclaim()):
            log.warning("%d jobs of lost workers were given back to the queue", returned)

    def _lease(self, member: Member) -> Lease:
        return Lease(self._connection.client, self._registry.keys(member.spec.name))

    def _status(self, member: Member) -> Mapping[str, str | int]:
        return {
            "state": member.state,
            "service": member.spec.name,
            "model": member.spec.model.model_name,
            "device": self._child_args.device or "auto",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "running": 0,
            "running_ms": 0,
            "past": self._child_args.past,
            **member.figures(),
        }
