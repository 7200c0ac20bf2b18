"""The servers that a run stands on: one behind proxies, or several that know each other."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Literal

from topologies import Topology, cluster, sentinel

from chaos_lib.journal import Journal, read
from chaos_lib.proxy import Proxy
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.server.datadir import AppendFsync
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.server.engine import bundled, version_text

Shape = Literal["single", "sentinel", "cluster"]


class Lone:
    """One server, with a proxy before the workers and another before the callers."""

    replicated = False

    def __init__(self, home: Path, fsync: AppendFsync, ends: ExitStack) -> None:
        self._data_dir = home / "data"
        self.server = EmbeddedServer.start(self._data_dir, binary=bundled(), tcp_port=0, appendfsync=fsync)
        ends.callback(self.server.stop)
        self.url = self.server.tcp_url or ""
        port = int(self.url.rpartition(":")[2])
        self.workers_way, self.clients_way = Proxy(port), Proxy(port)
        ends.callback(self.workers_way.close)
        ends.callback(self.clients_way.close)
        self.workers_url, self.clients_url = self.workers_way.url, self.clients_way.url

    def heal(self) -> None:
        for way in (self.workers_way, self.clients_way):
            way.clear()
        if not self.server.alive():
            self.server.restart()
        with suppress(ProcessLookupError):
            os.kill(self.server.pid, signal.SIGCONT)

    @property
    def version(self) -> str:
        return f"{self.server.engine} {version_text(self.server.version)}, alone"

    def journal(self, keys: ServiceKeys) -> Journal | None:
        """What the server wrote down of every job."""
        return read(self._data_dir, keys)


class Many:
    """A master under Sentinel, or a Cluster. Clients go straight to its nodes, and no node has the whole history."""

    def __init__(self, home: Path, shape: Shape, ends: ExitStack) -> None:
        # One replica: what it confirmed is what the next master knows. Of two, Sentinel may choose the other.
        start = partial(sentinel, replicas=1) if shape == "sentinel" else cluster
        self.topology: Topology = ends.enter_context(start(home / "servers"))
        self._shape = shape
        self.replicated = shape == "sentinel"
        self.url = self.workers_url = self.clients_url = self.topology.url

    def heal(self) -> None:
        for node in self.topology.nodes:
            if not node.alive:
                node.start()

    @property
    def version(self) -> str:
        return f"{self._shape} of {len(self.topology.nodes)} nodes"

    def journal(self, keys: ServiceKeys) -> Journal | None:
        return None


Ground = Lone | Many


def opened(home: Path, shape: Shape, fsync: AppendFsync, ends: ExitStack) -> Ground:
    return Lone(home, fsync, ends) if shape == "single" else Many(home, shape, ends)
