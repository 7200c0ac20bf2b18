"""A pool in a process of its own, and what can be seen of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from e2e.sites import Site, site_of
from e2e.supervisors import Supervision, supervising
from support import eventually

from millstream.broker.config.load import ServiceSpec
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.views import WorkerView
from millstream.worker.pool.args import PoolArgs
from millstream.worker.supervision.plan import Plan

TESTS = Path(__file__).parents[1]
START_S = 60.0


@dataclass(frozen=True)
class Running:
    """The sites of a pool's services, in its order, and its supervisor."""

    sites: Sequence[Site]
    supervision: Supervision

    def views(self) -> list[WorkerView | None]:
        """The only worker of each service; None if none lives."""
        views = Inspector(self.sites[0].connection).services([site.spec.name for site in self.sites])
        return [view.workers[0] if view.workers else None for view in views]

    def states(self) -> list[str]:
        return [view.state if view else "" for view in self.views()]

    def settled(self, ready: int) -> None:
        """Until each model was loaded once, and so many are in memory and the others on standby."""
        eventually(lambda: self._is_settled(ready), within_s=START_S)

    def _is_settled(self, ready: int) -> bool:
        views = self.views()
        states = [view.state for view in views if view and view.loads]
        return states.count("ready") == ready and states.count("standby") == len(views) - ready

    def rss(self) -> int:
        """Bytes that the process has in memory."""
        (pid,) = self.supervision.pids
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        return 0

    def loaded(self, count: int) -> None:
        eventually(lambda: self.states().count("ready") == count, within_s=START_S)


@contextmanager
def pool_of(
    url: str,
    home: Path,
    specs: Sequence[ServiceSpec],
    memory: int | None = None,
    residence_s: float | None = None,
    device: str = "cpu",
) -> Iterator[Running]:
    """One process that hosts these services."""
    first, *beside = specs
    plan = Plan(first, 1, device, str(TESTS), beside, PoolArgs("pool", memory, residence_s))
    with ExitStack() as ends:
        sites = [ends.enter_context(site_of(url, spec, home / str(at))) for at, spec in enumerate(specs)]
        supervision = ends.enter_context(supervising(url, plan))
        yield Running(sites, supervision)


def held_jobs(site: Site) -> set[str]:
    """Ids of the jobs that workers hold."""
    client, found = site.connection.client, set[str]()
    for stream, entry in site.watch.held():
        entries = cast(list[tuple[bytes, dict[bytes, bytes]]], client.xrange(stream, entry.decode(), entry.decode()))
        found |= {fields[b"id"].decode() for _, fields in entries}
    return found
