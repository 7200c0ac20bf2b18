"""The rate limit holds over all clients together, by the server's clock, and lets through what it promises."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from bystander import Bystander
from e2e.conftest import Say
from e2e.sites import echo
from support import eventually

from millstream.broker.config.rate_limit import RateLimit
from millstream.broker.config.spec import Runtime, ServiceSpec
from millstream.broker.contract.job import Job
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection

pytestmark = pytest.mark.alone

LIMIT = RateLimit(requests=90, rows=120, tokens=1200, per="tenant")
HALF = RateLimit(requests=45, rows=60, tokens=600, per="tenant")
TENANTS = ("rows", "tokens")
"""Each is stopped by the limit of its name first; see limited.py."""
PHASE_S = 5.0
USED = 0.98
STAMP_S = 0.001
"""Entries are stamped with whole milliseconds."""

HOUR_S = 3600.0
CROWD = [(tenant, clock_s, wait) for tenant in TENANTS for clock_s, wait in ((0, 1), (0, 1), (HOUR_S, 1), (0, 0))]
"""Eight processes: their tenant, how wrong their clocks are, and whether they wait when told to."""


@dataclass(frozen=True)
class Admitted:
    """One job that passed: when, by the server's clock (seconds), and what it cost of each limit."""

    at: float
    tenant: str
    rows: int
    tokens: int
    requests: int = 1

    @classmethod
    def of(cls, job: Job) -> Admitted:
        return cls(job.at / 1000, job.tenant, job.rows, job.tokens)


class Register(threading.Thread):
    """The service's only worker: answers every job, and notes it."""

    def __init__(self, bystander: Bystander) -> None:
        super().__init__()
        self.admitted: list[Admitted] = []
        self._bystander = bystander
        self._over = threading.Event()

    def run(self) -> None:
        while self._serve() or not self._over.is_set():
            pass

    def stop(self) -> None:
        """Answer what waits, then end."""
        self._over.set()
        self.join()

    def _serve(self) -> int:
        self._bystander.live()
        claims = self._bystander.queue.claim("bystander", rows=100_000, tokens=10**9).claims
        self.admitted += [Admitted.of(claim.job) for claim in claims if claim.job]
        self._bystander.answer(*claims)
        self._over.wait(0 if claims else 0.005)
        return len(claims)


class Asker:
    """One process of limited.py."""

    def __init__(self, url: str, service: str, tenant: str, clock_s: float, wait: int) -> None:
        path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "e2e.limited", service, tenant, str(clock_s), str(wait)],
            env={**os.environ, "PYTHONPATH": path, "MILLSTREAM_REDIS_URL": url},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def stop(self) -> None:
        """No new calls."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.stdin = None

    def answered(self) -> int:
        """How many of its calls were, once all have ended."""
        out, _ = self._process.communicate(timeout=30.0)
        return int(out)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def asking(url: str, service: str, tenant: str, clock_s: float, wait: int) -> Iterator[Asker]:
    asker = Asker(url, service, tenant, clock_s, wait)
    try:
        yield asker
    finally:
        asker.end()


@contextmanager
def served(connection: Connection, spec: ServiceSpec) -> Iterator[Register]:
    register = Register(Bystander(connection, spec))
    register.start()
    try:
        yield register
    finally:
        register.stop()


def limited(rate: RateLimit) -> Runtime:
    return Runtime(rate_limit=rate, total_timeout=60.0)


def seconds(connection: Connection) -> float:
    """The server's clock."""
    whole, micros = connection.client.time()
    return float(whole + micros / 1_000_000)


def excess(passed: Sequence[Admitted], unit: str, rate: float) -> float:
    """The most by which any stretch from one job to another let through more than `rate` times its length."""
    most, above, before = 0.0, 0.0, 0.0
    for job in passed:
        above = max(0.0, above - rate * (job.at - before)) + getattr(job, unit)
        most, before = max(most, above), job.at
    return most


def total(passed: Sequence[Admitted], unit: str) -> float:
    return float(sum(getattr(job, unit) for job in passed))


def test_all_clients_together_get_what_the_limit_allows_and_no_more(url: str, say: Say) -> None:
    spec = echo("").model_copy(update={"runtime": limited(LIMIT)})
    with ExitStack() as ends:
        connection = Connection(url, name="tests")
        ends.callback(connection.close)
        register = ends.enter_context(served(connection, spec))
        askers = [ends.enter_context(asking(url, spec.name, *each)) for each in CROWD]
        eventually(lambda: {job.tenant for job in register.admitted} == set(TENANTS), within_s=30.0)
        eventually(lambda: register.admitted[-1].at > register.admitted[0].at + PHASE_S, within_s=60.0)
        before = seconds(connection)
        Registry(connection).push([spec.model_copy(update={"runtime": limited(HALF)})], replace=True)
        after = seconds(connection)
        eventually(lambda: register.admitted[-1].at > after + PHASE_S, within_s=60.0)
        saturated = seconds(connection)
        # All at once: those that ask again at once leave little to those that wait.
        for asker in askers:
            asker.stop()
        answered = [asker.answered() for asker in askers]

    for tenant in TENANTS:
        passed = [job for job in register.admitted if job.tenant == tenant]
        assert len(passed) == sum(calls for (each, *_), calls in zip(CROWD, answered, strict=True) if each == tenant)
        for unit in ("requests", "rows", "tokens"):
            rate, half = getattr(LIMIT, unit), getattr(HALF, unit)
            assert excess([job for job in passed if job.at <= before], unit, rate) <= rate * (1 + STAMP_S)
            assert excess([job for job in passed if job.at > after], unit, half) <= half * (1 + STAMP_S)
            allowed = rate * (1 + after - passed[0].at) + half * (passed[-1].at - after + STAMP_S)
            assert total(passed, unit) <= allowed
        rate, half = getattr(LIMIT, tenant), getattr(HALF, tenant)
        wanted = [job for job in passed if job.at <= saturated]
        allowed = rate * (1 + before - wanted[0].at) + half * (wanted[-1].at - after)
        used = total(wanted, tenant) / allowed
        say(f"{len(wanted)} calls of tenant {tenant!r} passed: {used:.1%} of what {rate}, then {half} {tenant}/s allow")
        assert used >= USED
