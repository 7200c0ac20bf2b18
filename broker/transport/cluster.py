"""A client for a Redis Cluster that looks like a client of one server.

The library's own sends commands again by itself, which only our callers may decide, and connects when it is made. This
one knows the commands we use: the first key of each decides where it goes. It follows redirections, and asks for the
layout again whenever a node fails it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import redis
from redis import exceptions
from redis.client import Pipeline
from redis.crc import key_slot

from millstream.broker.config.url import Address

Command = tuple[tuple[object, ...], dict[str, object]]
"""A command's words, and what the library's parser of its answer is told."""

_SLOTS = 16_384
_REDIRECTIONS = 5
_KEYLESS = {"TIME", "INFO", "PING", "WAIT", "SCRIPT", "CLUSTER", "CLIENT", "CONFIG", "ASKING", "COMMAND"}
_OF_EVERY_NODE = {"SCAN", "KEYS", "DBSIZE", "FLUSHALL", "FLUSHDB"}
_ASKING: Command = (("ASKING",), {})


class Slots:
    """Which node owns which slot, as the Cluster said last. Thread-safe; threads that need it wait for one answer.

    `connect` makes a client of one node for one question.
    """

    def __init__(self, seeds: Sequence[Address], connect: Callable[[Address], redis.Redis]) -> None:
        self._seeds = seeds
        self._connect = connect
        self._lock = threading.Lock()
        self._owners: list[Address | None] = []
        self._known: set[Address] = set()
        self._doubted: Address | None = None

    def owner(self, slot: int) -> Address:
        """The node to ask. Raises ClusterDownError where nobody serves the slot, and what kept us from the nodes."""
        with self._lock:
            if not self._owners:
                self._learn_all()
            owner = self._owners[slot]
            if owner is None:
                self._owners = []
                raise exceptions.ClusterDownError("CLUSTERDOWN Hash slot not served")
            return owner

    def owners(self) -> list[Address]:
        """Every node that serves a slot."""
        with self._lock:
            if not self._owners:
                self._learn_all()
            return sorted({owner for owner in self._owners if owner})

    def learn(self, slot: int, owner: Address) -> None:
        """What a MOVED said."""
        with self._lock:
            if self._owners:
                self._owners[slot] = owner

    def doubt(self, node: Address) -> None:
        """A node failed: the Cluster is asked again before the next command, that node last."""
        with self._lock:
            self._owners, self._doubted = [], node

    def _learn_all(self) -> None:
        failed: exceptions.RedisError = exceptions.ConnectionError("no node is known")
        for node in self._candidates():
            try:
                self._owners = self._ask(node)
            except exceptions.RedisError as error:
                failed = error
            else:
                self._known = {owner for owner in self._owners if owner}
                self._doubted = None
                return
        raise failed

    def _candidates(self) -> list[Address]:
        nodes = list({*self._known, *self._seeds})
        # Not all processes ask the same node; and one that lives apart from the rest is not asked for ever.
        random.shuffle(nodes)
        return sorted(nodes, key=lambda node: node == self._doubted)

    def _ask(self, node: Address) -> list[Address | None]:
        client = self._connect(node)
        try:
            # Two words: the library's parser of CLUSTER SLOTS has another shape in each version.
            ranges = client.execute_command("CLUSTER", "SLOTS")  # type: ignore[no-untyped-call]
        finally:
            client.close()
        owners: list[Address | None] = [None] * _SLOTS
        for first, last, (host, port, *_), *_replicas in ranges:
            # A node that does not know how it is called leaves its name out.
            owner = ((host or b"").decode() or node[0], int(port))
            owners[first : last + 1] = [owner] * (last + 1 - first)
        return owners


class ClusterClient(redis.Redis):
    """Commands go to the node that owns their first key; of a pipeline, those without a key follow the one before.

    A command is sent again only where the node that got it refused to run it. `connect` makes the client of one node.
    """

    def __init__(self, slots: Slots, connect: Callable[[Address], redis.Redis], url: str) -> None:
        # Never connected: it is there for what the library asks its pool, such as the encoding.
        super().__init__(connection_pool=redis.ConnectionPool.from_url(url, protocol=2))
        self._slots = slots
        self._connect = connect
        self._opening = threading.Lock()
        self._nodes: dict[Address, redis.Redis] = {}

    def execute_command(self, *args: object, **options: object) -> object:
        (answer,) = self.run([(args, options)])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def pipeline(self, transaction: bool = True, shard_hint: object = None) -> Pipeline:
        """Only without a transaction: the client of `owner` has those, over the keys of one slot."""
        if transaction:
            raise exceptions.ClusterError("a transaction belongs to one node: ask the owner of its keys")
        return _ClusterPipeline(self)

    def load(self, script: bytes) -> None:
        """Load a script on every node that serves a slot, and on those that are about to."""
        failures = [failure for node in self._every() if (failure := _unloaded(node, script))]
        # One node's absence must not keep a script from the others.
        if len(failures) == len(self._every()):
            raise failures[0]

    def owner(self, key: str) -> redis.Redis:
        """The client of the node that has `key`: for commands that must go there, but name no key."""
        return self._node(self._slots.owner(key_slot(key.encode())))

    def masters(self) -> list[redis.Redis]:
        """A client of every node that serves a slot."""
        return [self._node(address) for address in self._slots.owners()]

    def close(self) -> None:
        for node in list(self._nodes.values()):
            node.close()

    def run(self, commands: Sequence[Command]) -> list[object]:
        """The answers, in order; a node's refusal is an answer. Raises where a node cannot be reached."""
        answers: dict[int, object] = {}
        for address, units in self._by_node(commands).items():
            sent = [command for unit in units for command in unit.commands]
            got = iter(self._send(address, sent))
            for unit in units:
                own = [next(got) for _ in unit.commands]
                answers.update(enumerate(self._followed(unit, address, own), unit.at))
        return [answers[at] for at in range(len(commands))]

    def _by_node(self, commands: Sequence[Command]) -> dict[Address, list[_Unit]]:
        by_node: dict[Address, list[_Unit]] = {}
        for unit in _units(commands):
            address = self._slots.owner(unit.slot) if unit.slot is not None else random.choice(self._slots.owners())
            by_node.setdefault(address, []).append(unit)
        return by_node

    def _followed(self, unit: _Unit, address: Address, answers: list[object]) -> list[object]:
        """The answers of `unit`, after where they point to; what was asked beside a key goes with it."""
        for _ in range(_REDIRECTIONS):
            error = answers[0]
            if isinstance(error, exceptions.ClusterDownError):
                self._slots.doubt(address)
            if not isinstance(error, exceptions.AskError) or unit.slot is None:
                return answers
            address = (error.host or address[0], error.port)
            # Each MOVED is an AskError to the library.
            if isinstance(error, exceptions.MovedError):
                self._slots.learn(unit.slot, address)
                answers = self._send(address, unit.commands)
            else:
                answers = self._send(address, [_ASKING, *unit.commands])[1:]
        return [exceptions.ClusterError("redirected again and again")] * len(answers)

    def _send(self, address: Address, commands: Sequence[Command]) -> list[object]:
        pipe = self._node(address).pipeline(transaction=False)
        for args, options in commands:
            pipe.execute_command(*args, **options)  # type: ignore[no-untyped-call]
        try:
            return pipe.execute(raise_on_error=False)
        except (exceptions.ConnectionError, exceptions.TimeoutError):
            self._slots.doubt(address)
            raise

    def _node(self, address: Address) -> redis.Redis:
        with self._opening:
            if address not in self._nodes:
                self._nodes[address] = self._connect(address)
            return self._nodes[address]

    def _every(self) -> list[redis.Redis]:
        owners = self.masters()
        return owners + [node for node in list(self._nodes.values()) if node not in owners]


class _ClusterPipeline(Pipeline):
    """Commands for one or many nodes, in one round trip to each."""

    def __init__(self, cluster: ClusterClient) -> None:
        super().__init__(cluster.connection_pool, cluster.response_callbacks, transaction=False, shard_hint=None)
        self._cluster = cluster

    def execute(self, raise_on_error: bool = True) -> list[object]:
        commands = cast(Sequence[Command], self.command_stack)
        try:
            answers = self._cluster.run(commands)
        finally:
            self.reset()
        if raise_on_error:
            self.raise_first_error(commands, answers)  # type: ignore[no-untyped-call]
        return answers


class _Unit:
    """Commands that stay together: one with a key, and those after it that name none. `at` is the first one's place."""

    __slots__ = ("at", "commands", "slot")

    def __init__(self, at: int, slot: int | None) -> None:
        self.at = at
        self.slot = slot
        self.commands: list[Command] = []


def owner(client: redis.Redis, key: str) -> redis.Redis:
    """The client of the server that has `key`: for TIME and transactions, which a Cluster must be told where to run."""
    return client.owner(key) if isinstance(client, ClusterClient) else client


def masters(client: redis.Redis) -> list[redis.Redis]:
    """A client of each server behind `client`."""
    return client.masters() if isinstance(client, ClusterClient) else [client]


def load(client: redis.Redis, script: bytes) -> None:
    """Put a script into the cache of each server that may be asked to run it."""
    if isinstance(client, ClusterClient):
        client.load(script)
    else:
        client.script_load(script)


def _units(commands: Sequence[Command]) -> Iterator[_Unit]:
    unit: _Unit | None = None
    for at, command in enumerate(commands):
        key = _first_key(command[0])
        if unit is None or key is not None:
            if unit is not None:
                yield unit
            unit = _Unit(at, None if key is None else key_slot(_bytes(key)))
        unit.commands.append(command)
    if unit is not None:
        yield unit


def _first_key(words: Sequence[object]) -> object | None:
    """The key that decides where a command goes; None where it names none."""
    name = _bytes(words[0]).decode().upper().partition(" ")[0]
    if name in _OF_EVERY_NODE:
        raise exceptions.ClusterError(f"{name} asks one node: ask each of the masters")
    if name in _KEYLESS:
        return None
    if name in ("EVALSHA", "EVAL"):
        return words[3]
    if name in ("XREAD", "XREADGROUP"):
        return words[[_bytes(word).upper() for word in words].index(b"STREAMS") + 1]
    return words[1]


def _bytes(word: object) -> bytes:
    return word if isinstance(word, bytes) else str(word).encode()


def _unloaded(node: redis.Redis, script: bytes) -> exceptions.RedisError | None:
    """Load a script; what kept us from it."""
    try:
        node.script_load(script)
    except exceptions.RedisError as error:
        return error
    return None
