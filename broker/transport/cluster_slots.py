"""The slot layout of a Redis Cluster: which node owns each slot, asked of the nodes in turn."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence

import redis
from redis import exceptions

from millstream.broker.config.url import Address

_SLOTS = 16_384


class Slots:
    """The owner of each slot, as the Cluster answered last.

    Thread-safe: threads that need the layout wait for one answer. `connect` makes a client of one node, which is closed
    after one command.
    """

    def __init__(self, seeds: Sequence[Address], connect: Callable[[Address], redis.Redis]) -> None:
        self._seeds = seeds
        self._connect = connect
        self._lock = threading.Lock()
        self._owners: list[Address | None] = []
        self._known: set[Address] = set()
        self._suspect: Address | None = None

    def owner(self, slot: int) -> Address:
        """Returns the node that owns `slot`.

        Raises ClusterDownError if no node serves it, and the last node's error if no node could be asked.
        """
        with self._lock:
            if not self._owners:
                self._learn_all()
            owner = self._owners[slot]
            if owner is None:
                self._owners = []
                raise exceptions.ClusterDownError("CLUSTERDOWN Hash slot not served")
            return owner

    def owners(self) -> list[Address]:
        """Returns every node that serves a slot, sorted."""
        with self._lock:
            if not self._owners:
                self._learn_all()
            return sorted({owner for owner in self._owners if owner})

    def learn(self, slot: int, owner: Address) -> None:
        """Records the owner of `slot` that a MOVED error named."""
        with self._lock:
            if self._owners:
                self._owners[slot] = owner

    def doubt(self, node: Address) -> None:
        """Drops the layout after `node` failed. The next command reads it again, and asks `node` last."""
        with self._lock:
            self._owners, self._suspect = [], node

    def _learn_all(self) -> None:
        failed: exceptions.RedisError = exceptions.ConnectionError("no node is known")
        for node in self._candidates():
            try:
                self._owners = self._ask(node)
            except exceptions.RedisError as error:
                failed = error
            else:
                self._known = {owner for owner in self._owners if owner}
                self._suspect = None
                return
        raise failed

    def _candidates(self) -> list[Address]:
        nodes = list({*self._known, *self._seeds})
        # In random order, so that processes spread over the nodes and do not always ask one that lost the others.
        random.shuffle(nodes)
        return sorted(nodes, key=lambda node: node == self._suspect)

    def _ask(self, node: Address) -> list[Address | None]:
        client = self._connect(node)
        try:
            # As two words the command has no parser: the library's parser of CLUSTER SLOTS differs between versions.
            ranges = client.execute_command("CLUSTER", "SLOTS")  # type: ignore[no-untyped-call]
        finally:
            client.close()
        owners: list[Address | None] = [None] * _SLOTS
        for first, last, (host, port, *_), *_replicas in ranges:
            # A node that does not know its own host name sends none: it is the host that was asked.
            owner = ((host or b"").decode() or node[0], int(port))
            owners[first : last + 1] = [owner] * (last + 1 - first)
        return owners
