"""The faults. Each finds its victim at work, harms it, sees that the harm was done, and waits until it is over.

A fault returns a Landing, or raises Missed where there was nothing to harm or the harm was not seen.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from e2e.hosts import WORKER_RUN, Host, gone
from e2e.watch import Entry, freeze_with_work
from support import eventually
from topologies import Topology

from chaos_lib.grounds import Lone, Many
from chaos_lib.ordered import Hold, OrderedEnd
from chaos_lib.proxy import Proxy
from chaos_lib.site import MAX_ATTEMPTS, Site
from millstream.broker.queue.lease import LEASE_S
from millstream.broker.transport.connection import retrying

AT_WORK_S = 5.0
IN_STEP_S = 30.0
"""How long a master that comes back may take to become a replica."""
OVER_S = 60.0
ORDERED_S = 60.0
"""Longest a supervisor may take to end that does not wait for its workers: the server may be away."""
LONG_FREEZE_S = 3 * LEASE_S


class Missed(Exception):
    """The fault did not land."""


@dataclass(frozen=True)
class Landing:
    """A fault that was seen. `recovery_s` until what it harmed went on; None where nothing says so."""

    recovery_s: float | None = None
    note: str = ""


Fault = Callable[[Site, Random], Landing]


# -- workers ---------------------------------------------------------------------------------------------------


def kill_worker(site: Site, chance: Random) -> Landing:
    """kill -9 of a worker that holds jobs, until all of them are answered or in live hands."""
    with _victim(site, chance) as (consumer, pid):
        held = _frozen_at_work(site, consumer, pid)
        os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
        eventually(lambda: _taken_over(site, held, consumer), within_s=OVER_S)
    return Landing(time.monotonic() - killed_at, f"{len(held)} jobs")


def freeze_worker(site: Site, chance: Random) -> Landing:
    """SIGSTOP of a worker that holds jobs, until they are no longer its own; then it wakes, and lives again."""
    with _victim(site, chance) as (consumer, pid):
        held = set(_frozen_at_work(site, consumer, pid))
        began = time.monotonic()
        try:
            eventually(lambda: held.isdisjoint(site.watch.held(consumer)), within_s=OVER_S)
            lost_s = time.monotonic() - began
            time.sleep(max(0.0, LEASE_S + 0.5 - lost_s))
            if consumer in site.watch.live():
                raise Missed("it was not taken for dead")
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        eventually(lambda: consumer in site.watch.live() or not _runs(pid), within_s=OVER_S)
    return Landing(lost_s, f"{len(held)} jobs")


@contextmanager
def _victim(site: Site, chance: Random) -> Iterator[tuple[str, int]]:
    """A live worker that no other fault has in hand, once there is one: its consumer and pid."""
    _when(lambda: _untaken(site), "no worker lives that no other fault has in hand")
    with site.lock:
        live = _untaken(site)
        if not live:
            raise Missed("another fault came first")
        consumer, pid = chance.choice(sorted(live))
        site.taken.add(pid)
    try:
        yield consumer, pid
    finally:
        site.taken.discard(pid)


def _untaken(site: Site) -> list[tuple[str, int]]:
    return [each for each in site.watch.live().items() if each[1] not in site.taken and _runs(each[1])]


def _frozen_at_work(site: Site, consumer: str, pid: int) -> list[Entry]:
    try:
        return freeze_with_work(site.watch, {consumer: pid}, within_s=AT_WORK_S)
    except (AssertionError, ProcessLookupError) as error:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        raise Missed("it held nothing, or died by itself") from error


def _taken_over(site: Site, held: list[Entry], dead: str) -> bool:
    owners = site.watch.live().keys() - {dead}
    return not retrying(lambda: site.watch.unsettled(held, owners))


def _runs(pid: int) -> bool:
    return _state(pid) not in ("", "Z")


def _state(pid: int) -> str:
    """As ps shows it: R, S, T, Z; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


# -- supervisors -----------------------------------------------------------------------------------------------


def kill_supervisor(site: Site, chance: Random) -> Landing:
    """kill -9 of a supervisor whose workers hold jobs. They drain and end by themselves; a new one is started."""
    with site.lock:
        host = chance.choice(site.hosts)
        children = {consumer: pid for consumer, pid in site.watch.live().items() if pid in host.children}
        if not children:
            raise Missed("it had no live worker")
        _when(lambda: any(site.watch.held(consumer) for consumer in children), "its workers held nothing")
        orphans = host.children
        host.kill()
        site.hosts.remove(host)
        site.start_host(host.program)
    killed_at = time.monotonic()
    try:
        gone(orphans, within_s=OVER_S)
    except AssertionError:
        site.problems.append(f"workers {orphans} outlived their supervisor for {OVER_S:g} s")
        raise
    return Landing(time.monotonic() - killed_at, f"{len(orphans)} workers")


def force_drain(site: Site, chance: Random) -> Landing:
    """A supervisor is told to stop and kills its workers amid their forwards; a new one is started.

    One that grants no time does so at once, `worker run` at the second signal. What the workers had begun may cost
    nobody an attempt.
    """
    host = chance.choice(site.hosts)
    _when(lambda: _free_workers(site, host), "it had no live worker")
    with site.lock:
        children = _free_workers(site, host)
        if not children or host not in site.hosts:
            raise Missed("another fault came first")
        held = _frozen_together(site, children)
        began = site.now_ms()
        site.hosts.remove(host)
        ordered_at = time.monotonic()
        try:
            _order_to_end(host)
        finally:
            site.start_host(host.program)
        site.ordered.append(OrderedEnd(began, site.now_ms(), held))
    eventually(lambda: _taken_over(site, list(held), ""), within_s=OVER_S)
    return Landing(time.monotonic() - ordered_at, f"{len(held)} jobs")


def _free_workers(site: Site, host: Host) -> dict[str, int]:
    """The live workers of `host` that no other fault has in hand: consumer -> pid."""
    ours = [each for each in site.watch.live().items() if each[1] in host.children]
    return {consumer: pid for consumer, pid in ours if pid not in site.taken and _runs(pid)}


def _frozen_together(site: Site, children: Mapping[str, int]) -> Mapping[Entry, Hold]:
    """Stop these workers while each holds jobs; all that they hold."""
    try:
        freeze_with_work(site.watch, children, within_s=AT_WORK_S)
    except (AssertionError, ProcessLookupError) as error:
        for pid in children.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        raise Missed("its workers held nothing, or one died by itself") from error
    return {
        entry: Hold(consumer, count)
        for consumer in children
        for entry, count in site.watch.deliveries(consumer).items()
    }


def _order_to_end(host: Host) -> None:
    host.terminate()
    if host.program == WORKER_RUN:
        host.interrupt()
    try:
        host.wait(ORDERED_S)
    except subprocess.TimeoutExpired as error:
        host.kill()
        raise Missed(f"it had not ended after {ORDERED_S:g} s") from error


# -- the server ------------------------------------------------------------------------------------------------


def kill_server(site: Site, chance: Random) -> Landing:
    """kill -9 of the server while jobs are held; it is started again after a moment, on the same data and port."""
    lone = _lone(site)
    _at_work(site)
    killed_at = time.monotonic()
    os.kill(lone.server.pid, signal.SIGKILL)
    try:
        _when(lambda: _refuses(lone.url), "it still listened")
        time.sleep(chance.choice((0.0, 0.5, 2.0)))
    finally:
        lone.server.restart()
        site.keep_history()
    return Landing(_flowing_since(site, killed_at))


def freeze_server_briefly(site: Site, chance: Random) -> Landing:
    return _freeze_server(site, chance.uniform(0.2, 2.0))


def freeze_server_for_leases(site: Site, chance: Random) -> Landing:
    """Far longer than any lease: no worker is dead when it is over."""
    return _freeze_server(site, LONG_FREEZE_S)


def _freeze_server(site: Site, seconds: float) -> Landing:
    _at_work(site)
    pid = _lone(site).server.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)
        stopped = _state(pid) == "T"
    finally:
        os.kill(pid, signal.SIGCONT)
    if not stopped:
        raise Missed("it was not stopped")
    return Landing(_flowing_since(site, time.monotonic()), f"{seconds:.1f} s")


def flush_scripts(site: Site, chance: Random) -> Landing:
    _at_work(site)
    began = time.monotonic()
    pipe = site.connection.client.pipeline(transaction=True)
    pipe.info("memory")
    pipe.script_flush()
    pipe.info("memory")
    before, _, after = pipe.execute()
    if before["number_of_cached_scripts"] == 0 or after["number_of_cached_scripts"] > 0:
        raise Missed("no script was cached")
    return Landing(_flowing_since(site, began), f"{before['number_of_cached_scripts']} scripts")


def kill_connections(site: Site, chance: Random) -> Landing:
    """CLIENT KILL TYPE normal: every connection but the one that asks."""
    _at_work(site)
    began = time.monotonic()
    killed = int(site.connection.client.client_kill_filter(_type="normal", skipme=True))
    if not killed:
        raise Missed("nobody was connected")
    return Landing(_flowing_since(site, began), f"{killed} connections")


def kill_master(site: Site, chance: Random) -> Landing:
    """kill -9 of the master that the Sentinels name. They make another, and the old one comes back as its replica."""
    topology = _many(site).topology
    _when(lambda: _all_copy(topology), "not all replicas were in step", within_s=IN_STEP_S)
    _at_work(site)
    began, killed = time.monotonic(), topology.kill_master()
    try:
        eventually(lambda: topology.master() is not killed, within_s=OVER_S)
    finally:
        killed.start()
    # Not before: with no replica nothing is accepted.
    return Landing(_flowing_since(site, began))


def _all_copy(topology: Topology) -> bool:
    """Whether the loss of the master would lose nothing that a replica confirmed: an older copy might replace it."""
    others = [node for node in topology.nodes if node is not topology.master()]
    return all(node.replication("master_link_status") == "up" for node in others)


def move_slot(site: Site, chance: Random) -> Landing:
    """The service's slot goes to another master of the Cluster, a few keys at a time, while jobs are held."""
    _at_work(site)
    began = time.monotonic()
    _many(site).topology.move_slot(site.spec.name, per_step=chance.choice((1, 10, 100)))
    return Landing(_flowing_since(site, began))


def _lone(site: Site) -> Lone:
    if not isinstance(site.ground, Lone):
        raise Missed("there are several servers")
    return site.ground


def _many(site: Site) -> Many:
    if not isinstance(site.ground, Many):
        raise Missed("there is one server")
    return site.ground


def _way(site: Site, chance: Random) -> Proxy:
    """The workers' or the callers'."""
    lone = _lone(site)
    return chance.choice((lone.workers_way, lone.clients_way))


def _at_work(site: Site) -> None:
    _when(site.watch.held, "no job was held")


def _flowing(site: Site) -> None:
    """Wait until jobs come and go: a server that is frozen for long has ended."""
    before = site.ended_jobs()
    _when(lambda: site.ended_jobs() > before, "no job ended", within_s=2 * LONG_FREEZE_S)


def _flowing_since(site: Site, began: float) -> float:
    """Seconds from `began` until another job ended."""
    before = site.ended_jobs()
    eventually(lambda: site.ended_jobs() > before, within_s=OVER_S)
    return time.monotonic() - began


def _refuses(url: str) -> bool:
    host, _, port = url.rpartition("/")[2].rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


# -- the network -----------------------------------------------------------------------------------------------


def cut_connections(site: Site, chance: Random) -> Landing:
    """RST to some or all connections of workers or of clients, which come back."""
    _at_work(site)
    way = _way(site, chance)
    before, began = way.opened, time.monotonic()
    cut = way.cut(chance.choice((0.3, 1.0)), chance)
    if not cut:
        raise Missed("nothing was connected")
    eventually(lambda: way.opened > before, within_s=OVER_S)
    return Landing(_flowing_since(site, began), f"{cut} connections")


def swallow(site: Site, chance: Random) -> Landing:
    """For a while nothing passes, and nobody is told. Shorter than a lease: beyond it a worker is rightly lost."""
    way = _way(site, chance)
    _flowing(site)
    way.blackhole()
    try:
        time.sleep(chance.uniform(0.3, LEASE_S - 2.0))
    finally:
        withheld, _ = way.clear()
    if not withheld:
        raise Missed("nothing was sent meanwhile")
    return Landing(_flowing_since(site, time.monotonic()), f"{withheld} chunks")


def slow_down(site: Site, chance: Random) -> Landing:
    way = _way(site, chance)
    _flowing(site)
    way.delay(chance.uniform(0.01, 0.2))
    try:
        time.sleep(chance.uniform(0.5, 3.0))
    finally:
        _, delayed = way.clear()
    if not delayed:
        raise Missed("nothing was sent meanwhile")
    return Landing(note=f"{delayed} chunks")


# -- callers ---------------------------------------------------------------------------------------------------


def kill_client(site: Site, chance: Random) -> Landing:
    """kill -9 of a process amid its calls; another takes its place."""
    calling = chance.choice(list(site.calling))
    _when(calling.under_way, "it waited for nothing")
    calling.kill()
    site.bury(calling)
    left = calling.under_way()
    site.start_callers(calling.kind).begin()
    if not left:
        raise Missed("it had no call under way")
    return Landing(note=f"{left} calls under way")


def poison(site: Site, chance: Random) -> Landing:
    """A job that kills every worker that runs it, until it is among the dead letters and its caller is told."""
    deaths, began = site.deaths(), time.monotonic()
    job = site.send_poison()
    eventually(lambda: site.poison_replies()[job], within_s=OVER_S)
    if site.deaths() - deaths < 1:
        raise Missed("no worker died of it")
    return Landing(time.monotonic() - began, f"{MAX_ATTEMPTS} attempts")


def _when(condition: Callable[[], object], otherwise: str, *, within_s: float = AT_WORK_S) -> None:
    """Wait for the moment. Raises Missed where it does not come."""
    try:
        eventually(condition, within_s=within_s)
    except AssertionError as error:
        raise Missed(otherwise) from error


OUTAGES: Mapping[str, tuple[Fault, float]] = {
    "server killed": (kill_server, 4.0),
    "server frozen 0.2-2 s": (freeze_server_briefly, 3.0),
    "server frozen 15 s": (freeze_server_for_leases, LONG_FREEZE_S + 1),
    "SCRIPT FLUSH": (flush_scripts, 1.0),
    "CLIENT KILL": (kill_connections, 1.0),
}
NETWORK: Mapping[str, tuple[Fault, float]] = {
    "connections cut": (cut_connections, 1.0),
    "connections swallow all": (swallow, 4.0),
    "connections slow": (slow_down, 3.0),
}
MASTERS: Mapping[str, tuple[Fault, float]] = {"master killed": (kill_master, 8.0)}
SLOTS: Mapping[str, tuple[Fault, float]] = {"slot moved": (move_slot, 2.0)}
WORKERS_KILLED: Mapping[str, tuple[Fault, float]] = {"worker killed": (kill_worker, 3.0)}
WORKERS_FROZEN: Mapping[str, tuple[Fault, float]] = {"worker frozen > lease": (freeze_worker, 8.0)}
SUPERVISORS: Mapping[str, tuple[Fault, float]] = {"supervisor killed": (kill_supervisor, 4.0)}
DRAINS: Mapping[str, tuple[Fault, float]] = {"drain forced": (force_drain, 4.0)}
CLIENTS: Mapping[str, tuple[Fault, float]] = {"client killed": (kill_client, 3.0)}
POISONS: Mapping[str, tuple[Fault, float]] = {"poison job": (poison, 8.0)}
