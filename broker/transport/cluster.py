"""A client for a Redis Cluster with the interface of a client for one server.

The library's Cluster client repeats commands by itself, which only our callers may decide, and it connects in its
constructor. This client knows the commands we use: the first key of each decides which node gets it. It follows
redirections, and reads the slot layout (`cluster_slots.py`) again if a node fails.
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
from millstream.broker.transport.cluster_slots import Slots

Command = tuple[tuple[object, ...], dict[str, object]]
"""A command's words, and the options for the library's parser of its answer."""

_REDIRECTIONS = 5
"""Redirections of one command that are followed at most."""

_KEYLESS = {"TIME", "INFO", "PING", "WAIT", "SCRIPT", "CLUSTER", "CLIENT", "CONFIG", "ASKING", "COMMAND"}
_OF_EVERY_NODE = {"SCAN", "KEYS", "DBSIZE", "FLUSHALL", "FLUSHDB"}
_ASKING: Command = (("ASKING",), {})


class ClusterClient(redis.Redis):
    """Sends each command to the node that owns its first key. In a pipeline, a command without a key follows the one
    before it.

    A command is sent again only if the node that received it refused to run it. `connect` makes the client of one node.
    """

    def __init__(self, slots: Slots, connect: Callable[[Address], redis.Redis], url: str) -> None:
        # This pool never connects. The library reads settings from it, such as the encoding.
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
        """Returns a pipeline without a transaction.

        Raises ClusterError if `transaction`: use the client that `owner` returns, for the keys of one slot.
        """
        if transaction:
            raise exceptions.ClusterError("a transaction runs on one node: use the client of the owner of its keys")
        return _ClusterPipeline(self)

    def load(self, script: bytes) -> None:
        """Loads a script on every node that serves a slot, and on the other nodes in use, which may soon serve one.

        Raises the first error if every node fails.
        """
        failures = [failure for node in self._every() if (failure := _try_load(node, script))]
        # If only some nodes fail, the script is usable on the others.
        if len(failures) == len(self._every()):
            raise failures[0]

    def owner(self, key: str) -> redis.Redis:
        """Returns the client of the node that owns `key`, for commands that must run there but name no key."""
        return self._node(self._slots.owner(key_slot(key.encode())))

    def masters(self) -> list[redis.Redis]:
        """Returns a client of every node that serves a slot."""
        return [self._node(address) for address in self._slots.owners()]

    def close(self) -> None:
        for node in list(self._nodes.values()):
            node.close()

    def run(self, commands: Sequence[Command]) -> list[object]:
        """Returns the answers in order; a node's error is an answer.

        Raises redis.ConnectionError or redis.TimeoutError if a node cannot be reached.
        """
        answers: dict[int, object] = {}
        for address, units in self._by_node(commands).items():
            batch = [command for unit in units for command in unit.commands]
            replies = iter(self._send(address, batch))
            for unit in units:
                own = [next(replies) for _ in unit.commands]
                answers.update(enumerate(self._follow(unit, address, own), unit.at))
        return [answers[at] for at in range(len(commands))]

    def _by_node(self, commands: Sequence[Command]) -> dict[Address, list[_Unit]]:
        by_node: dict[Address, list[_Unit]] = {}
        for unit in _units(commands):
            address = self._slots.owner(unit.slot) if unit.slot is not None else random.choice(self._slots.owners())
            by_node.setdefault(address, []).append(unit)
        return by_node

    def _follow(self, unit: _Unit, address: Address, answers: list[object]) -> list[object]:
        """Returns the answers of `unit` after following redirections. All commands of the unit go to the new node."""
        for _ in range(_REDIRECTIONS):
            error = answers[0]
            if isinstance(error, exceptions.ClusterDownError):
                self._slots.doubt(address)
            if not isinstance(error, exceptions.AskError) or unit.slot is None:
                return answers
            address = (error.host or address[0], error.port)
            # MovedError is a subclass of AskError in the library.
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
    """A pipeline over one or several nodes, with one round trip to each."""

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
    """Commands that go to one node together: one with a key, and those after it that name none.

    `at` is the index of the first one among all commands.
    """

    __slots__ = ("at", "commands", "slot")

    def __init__(self, at: int, slot: int | None) -> None:
        self.at = at
        self.slot = slot
        self.commands: list[Command] = []


def owner(client: redis.Redis, key: str) -> redis.Redis:
    """Returns the client of the server that owns `key`, for TIME and transactions, which name no key of their own."""
    return client.owner(key) if isinstance(client, ClusterClient) else client


def masters(client: redis.Redis) -> list[redis.Redis]:
    """Returns a client of each server behind `client`."""
    return client.masters() if isinstance(client, ClusterClient) else [client]


def load(client: redis.Redis, script: bytes) -> None:
    """Loads a script into the cache of each server that may run it. Raises the library's error if all fail."""
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
    """Returns the key that decides which node gets a command, or None if the command names no key.

    Raises ClusterError for a command that must run on every node.
    """
    name = _bytes(words[0]).decode().upper().partition(" ")[0]
    if name in _OF_EVERY_NODE:
        raise exceptions.ClusterError(f"{name} reads or changes one node only: run it on each of the masters")
    if name in _KEYLESS:
        return None
    if name in ("EVALSHA", "EVAL"):
        return words[3]
    if name in ("XREAD", "XREADGROUP"):
        return words[[_bytes(word).upper() for word in words].index(b"STREAMS") + 1]
    return words[1]


def _bytes(word: object) -> bytes:
    return word if isinstance(word, bytes) else str(word).encode()


def _try_load(node: redis.Redis, script: bytes) -> exceptions.RedisError | None:
    """Loads a script. Returns the error if that fails."""
    try:
        node.script_load(script)
    except exceptions.RedisError as error:
        return error
    return None
