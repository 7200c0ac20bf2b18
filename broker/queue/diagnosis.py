"""Rules that name why nothing moves, and what will break soon, from what the server shows. Pure."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from millstream.broker.config.load import ServiceSpec
from millstream.broker.contract.job import PRIORITIES
from millstream.broker.queue.lease import LEASE_S
from millstream.broker.queue.server_facts import ServerFacts
from millstream.broker.queue.supervisors import SupervisorView
from millstream.broker.queue.views import ServiceView

Severity = Literal["error", "warning", "note"]
"""error: jobs do not move, or get lost. warning: they will not soon, or one part does not work. note: worth a look."""

EARLY_DEATHS = 3
"""Workers of one place that ended early in a row, from which on it is a crash loop."""

NEARLY_FULL = 0.8
"""Share of max_queue_size, or of the server's memory, from which on there is a warning."""

UNSENT_MS = 1000 * LEASE_S
"""Age of a webhook's announcement, and time since a sender looked for some, ms, from which on there is a warning."""

SKEW_MS = 2_000
"""Difference between two clocks from which on times in logs mislead."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One trouble. `service` is "" if it is the server's. `cause` is a stable name, `fix` a command or what to do."""

    severity: Severity
    service: str
    cause: str
    what: str
    fix: str


def diagnose(services: Sequence[tuple[ServiceSpec, ServiceView]], servers: Sequence[ServerFacts]) -> Sequence[Finding]:
    """Returns all findings, the most severe first; those of the server before those of its services."""
    # A job that a replica has outlives a restart of the server.
    is_replicated = bool(services) and all(spec.replicated for spec, _ in services)
    found = [finding for server in servers for finding in _of_server(server, is_replicated=is_replicated)]
    if not services:
        found.append(
            Finding("error", "", "no_service", "no service is registered under this prefix", "millstream config push")
        )
    for spec, view in services:
        found += _of_service(spec, view)
    found += _of_hosts([view for _, view in services])
    order: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda finding: order[finding.severity])


# -- the server ------------------------------------------------------------------------------------------------------


def _of_server(server: ServerFacts, *, is_replicated: bool) -> Iterator[Finding]:
    if server.policy not in ("", "noeviction"):
        yield Finding(
            "error" if server.max_bytes else "warning",
            "",
            "evicting_policy",
            f"maxmemory-policy is {server.policy}: when its memory is full, the server deletes accepted jobs",
            "redis-cli CONFIG SET maxmemory-policy noeviction, and the same line in its configuration",
        )
    if server.max_bytes and server.used_bytes >= NEARLY_FULL * server.max_bytes:
        share = server.used_bytes / server.max_bytes
        yield Finding(
            "error" if share >= 1 else "warning",
            "",
            "memory_full",
            f"the server uses {share:.0%} of its maxmemory; when that is full, no job is accepted",
            "add workers, or raise maxmemory",
        )
    if server.failed_write:
        yield Finding(
            "error",
            "",
            "disk_write_failed",
            f"the server's last write to its disk failed ({server.failed_write})",
            "free disk space there, and look at its log",
        )
    if not server.appends and not is_replicated:
        yield Finding(
            "warning",
            "",
            "not_durable",
            "appendonly is off: accepted jobs are lost if the server restarts",
            "redis-cli CONFIG SET appendonly yes, and the same line in its configuration",
        )
    if abs(server.clock_ms) >= SKEW_MS:
        yield Finding(
            "warning",
            "",
            "clock_skew",
            f"this host's clock is {_ahead(server.clock_ms)} the server's: times in logs do not agree; deadlines "
            "are the server's and hold",
            "set both by NTP",
        )


# -- a service -------------------------------------------------------------------------------------------------------


def _of_service(spec: ServiceSpec, view: ServiceView) -> Iterator[Finding]:
    yield from _pause(view)
    yield from _drains(view)
    yield from _workers(view)
    yield from _supervisors(view)
    yield from _weights(view)
    yield from _lost(view)
    yield from _full(spec, view)
    yield from _webhooks(view)
    if view.dead_letters:
        yield Finding(
            "note",
            view.name,
            "dead_letters",
            f"{_jobs(view.dead_letters)} in the dead letters",
            f"millstream dead ls {_word(view.name)}",
        )


def _pause(view: ServiceView) -> Iterator[Finding]:
    if view.paused:
        new = "new jobs are refused" if view.paused.refusing else "new jobs wait"
        time_left = "" if view.paused.left_ms is None else f" for {view.paused.left_ms / 1000:.0f} s"
        yield Finding(
            "error" if view.depth else "warning",
            view.name,
            "paused",
            f"it is paused{time_left}: workers claim nothing, {new}, {_jobs(view.depth)} waiting",
            f"millstream queue resume {_word(view.name)}",
        )


def _drains(view: ServiceView) -> Iterator[Finding]:
    """Finds places that an operator keeps empty. It is a note while other workers take the jobs."""
    if not view.drained:
        return
    is_served = _is_served(view)
    names = sorted(view.drained)
    yield Finding(
        "note" if is_served else "error" if view.depth else "warning",
        view.name,
        "drained",
        f"an operator keeps workers away ({', '.join(names)}): {_jobs(view.depth)} waiting",
        f"millstream worker start {' '.join(map(_word, names))}",
    )


def _is_served(view: ServiceView) -> bool:
    """Whether a worker takes jobs. Those of a paused service are ready for its end."""
    return any(worker.state in ("ready", "paused") for worker in view.workers)


def _workers(view: ServiceView) -> Iterator[Finding]:
    live = [each for each in view.supervisors if each.lives]
    is_drained = bool(live) and all(each.state.drained >= each.state.planned for each in live)
    if _is_served(view) or (view.drained and is_drained):
        return
    waiting = f"{_jobs(view.depth)} waiting"
    draining = [worker for worker in view.workers if worker.state == "draining"]
    starting = [each.state for each in live if not each.state.failures and not each.state.refused]
    starting = [state for state in starting if state.drained < state.planned]
    if starting and not draining:
        planned = sum(state.planned - state.drained for state in starting)
        yield Finding(
            "note",
            view.name,
            "starting",
            f"workers are starting ({planned}), {waiting}",
            "wait until they are ready",
        )
        return
    what = f"all {len(draining)} live workers drain" if draining else "no worker lives"
    yield Finding(
        "error" if view.depth else "warning",
        view.name,
        "no_worker",
        f"{what}: {waiting}",
        f"millstream worker run {_word(view.name)}",
    )


def _supervisors(view: ServiceView) -> Iterator[Finding]:
    hosts = {each.state.host for each in view.supervisors if each.lives}
    for each in view.supervisors:
        # A new one on its host takes the place of one that ended.
        if each.lives or each.state.host not in hosts:
            yield from _supervisor(view, each)
        if each.lives and abs(each.clock_ms) >= SKEW_MS:
            yield Finding(
                "warning",
                view.name,
                "clock_skew",
                f"the clock of {each.state.host} is {_ahead(each.clock_ms)} the server's: times in logs do not agree",
                "set both by NTP",
            )


def _supervisor(view: ServiceView, supervisor: SupervisorView) -> Iterator[Finding]:
    state = supervisor.state
    who = f"the supervisor {state.pid} on {state.host}"
    start = f"millstream worker run {_word(view.name)}"
    severity: Severity = "warning" if view.workers else "error"
    if state.refused:
        what = f"{who} could start no worker: {state.refused}"
        fix = f"mend that, then start it again, such as with {start}"
        yield Finding(severity, view.name, "worker_refused", what, fix)
    elif not supervisor.lives:
        what = f"{who} ended without a drain {supervisor.age_ms / 1000:.0f} s ago; it kept {state.planned} workers"
        yield Finding(severity, view.name, "dead_supervisor", what, f"start it again there, such as with {start}")
    elif state.unloaded:
        what = f"a pool under {who} cannot load its model: {state.unloaded}"
        yield Finding(severity, view.name, "model_not_loaded", what, "mend that; the pool tries it again by itself")
    elif state.failures >= EARLY_DEATHS:
        what = f"{state.failures} workers in a row ended early under {who}; the last one {state.past}"
        fix = f"look at that supervisor's log, and at the dead letters: millstream dead ls {_word(view.name)}"
        yield Finding("error", view.name, "crash_loop", what, fix)


def _weights(view: ServiceView) -> Iterator[Finding]:
    weights = sorted({worker.fingerprint for worker in view.workers if worker.fingerprint})
    if len(weights) > 1:
        yield Finding(
            "error",
            view.name,
            "mixed_weights",
            f"its workers run different weights: {', '.join(weights)}",
            "start the workers with the wrong ones again from the right files: millstream worker ls shows them",
        )


def _lost(view: ServiceView) -> Iterator[Finding]:
    live = {worker.consumer for worker in view.workers}
    lost = {consumer: count for consumer, count in view.held.items() if consumer not in live and count}
    if lost:
        who = ", ".join(sorted(lost))
        then = f"a live worker takes them within {LEASE_S + 3:.0f} s" if live else "nobody gives them back"
        yield Finding(
            "warning" if live else "error",
            view.name,
            "stale_consumer",
            f"{_jobs(sum(lost.values()))} held by workers that do not live any more ({who}): {then}",
            "wait" if live else f"millstream worker run {_word(view.name)}",
        )


def _full(spec: ServiceSpec, view: ServiceView) -> Iterator[Finding]:
    for priority in PRIORITIES:
        count, most = view.unsettled.get(priority, 0), spec.runtime.queue_size(priority.value)
        if count >= NEARLY_FULL * most:
            is_full = count >= most
            yield Finding(
                "error" if is_full else "warning",
                view.name,
                "queue_full",
                f"{count} of at most {most} {priority.value} jobs"
                + (": further ones are refused" if is_full else "; when it is full, further ones are refused"),
                "add workers, raise max_queue_size, or send less",
            )


def _webhooks(view: ServiceView) -> Iterator[Finding]:
    waiting = view.announced
    # A new announcement has no sender yet, and a sender that lives looks every second.
    if waiting.oldest_ms < UNSENT_MS or (waiting.unsent_ms is not None and waiting.unsent_ms < UNSENT_MS):
        return
    yield Finding(
        "warning",
        view.name,
        "no_webhook_sender",
        f"{waiting.count} webhook{'' if waiting.count == 1 else 's'} waiting, the oldest for "
        f"{waiting.oldest_ms / 1000:.0f} s, and no live supervisor sends them",
        "name webhooks.allow and webhooks.secret_file in the config.yaml of a host with a supervisor, then start it "
        f"again, such as with millstream worker run {_word(view.name)}",
    )


# -- hosts -----------------------------------------------------------------------------------------------------------


def _of_hosts(views: Sequence[ServiceView]) -> Iterator[Finding]:
    """Finds hosts whose forwards together use more threads than there are cores."""
    cores: defaultdict[str, int] = defaultdict(int)
    threads: dict[str, dict[str, int]] = defaultdict(dict)
    for view in views:
        for each in view.supervisors:
            if each.lives:
                cores[each.state.host] = max(cores[each.state.host], each.state.cores)
        # A process of several services is one consumer.
        for worker in view.workers:
            threads[worker.host][worker.consumer] = max(worker.threads, threads[worker.host].get(worker.consumer, 0))
    for host, by_worker in threads.items():
        used = sum(by_worker.values())
        # One thread each is the least that workers can use.
        if cores[host] and used > max(cores[host], len(by_worker)):
            yield Finding(
                "warning",
                "",
                "too_many_threads",
                f"the {len(by_worker)} workers on {host} use {used} threads on {cores[host]} cores: each forward waits "
                "for the others",
                "leave OMP_NUM_THREADS unset there, or start fewer workers",
            )


def _ahead(clock_ms: int) -> str:
    return f"{abs(clock_ms) / 1000:.1f} s {'ahead of' if clock_ms > 0 else 'behind'}"


def _jobs(count: int) -> str:
    return f"{count} job{'' if count == 1 else 's'}"


def _word(service: str) -> str:
    return shlex.quote(service)
