"""Orders of operators that keep workers away: a worker, or all workers of a host, ends and none starts in its place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal, cast

import redis

from millstream.broker.contract.keys import HOST_LENGTH, ServiceKeys

Order = Literal["drain", "stop"]
"""drain: the worker claims nothing more and settles what it holds. stop: it ends at once, its jobs are given back."""

KEPT_S = 86_400
"""Seconds for which the orders of a service are kept after the last one was given, or a supervisor last followed one.
"""


class Drains:
    """The orders of one service, over one client. Each names a worker's consumer or a host."""

    def __init__(self, client: redis.Redis, keys: ServiceKeys) -> None:
        self._client = client
        self._key = keys.drained()

    def give(self, names: Iterable[str], order: Order) -> None:
        """Orders each named worker or host to end, and to stay away until `lift`."""
        pipe = self._client.pipeline(transaction=False)
        pipe.hset(self._key, mapping=dict.fromkeys(names, order))
        pipe.pexpire(self._key, KEPT_S * 1000)
        pipe.execute()

    def lift(self, names: Collection[str]) -> int:
        """Lets workers start again in these places. Returns how many orders there were."""
        return int(self._client.hdel(self._key, *names)) if names else 0

    def read(self) -> Mapping[str, Order]:
        """Returns the order of each named worker and host."""
        return read_drains(self._client.hgetall(self._key))

    def keep(self) -> None:
        """Keeps the orders for a further KEPT_S. A supervisor that follows one calls this."""
        self._client.pexpire(self._key, KEPT_S * 1000)


def queue_drains(pipe: redis.client.Pipeline, keys: ServiceKeys) -> None:
    """Adds the command to `pipe` whose reply `read_drains` takes."""
    pipe.hgetall(keys.drained())


def read_drains(value: object) -> Mapping[str, Order]:
    """Returns the order of each name, given the reply. An order that this version does not know is a drain."""
    orders = cast(Mapping[bytes, bytes], value or {})
    return {
        name.decode(errors="backslashreplace"): "stop" if order == b"stop" else "drain"
        for name, order in orders.items()
    }


def is_on(host: str, name: str) -> bool:
    """Returns whether `name` is `host`, or a worker on it: the name of a worker begins with that of its host."""
    return name == host or name.startswith(f"{host[:HOST_LENGTH]}-")


def find_order(orders: Mapping[str, Order], names: Iterable[str]) -> Order | None:
    """Returns the order for any of `names`, None if there is none. A stop goes before a drain."""
    found = {orders[name] for name in names if name in orders}
    return "stop" if "stop" in found else "drain" if found else None
