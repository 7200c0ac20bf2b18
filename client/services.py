"""What this process knows of the services: their specifications and live workers, read from Redis and kept a moment."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

from millstream.broker.config.load import ServiceSpec
from millstream.broker.contract.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    InvalidRequest,
    MillstreamError,
    NoWorkers,
    UnknownService,
)
from millstream.broker.queue.admission import resume_hint
from millstream.broker.queue.lease import Lease
from millstream.broker.queue.pause import find_pause
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection, translated
from millstream.client.asker import REFRESH_WAIT_S, Asker, Question

FRESH_S = 1.0
_OPS = {"embedding": "embed", "reranker": "rerank", "custom": "call", "echo": "echo"}


@dataclass(frozen=True, slots=True)
class Known:
    """One service, as the server described it at `read_at`, monotonic seconds."""

    spec: ServiceSpec
    fingerprint: str
    live_workers: int
    paused: bool
    read_at: float
    away: MillstreamError | None = None
    """Why the server could not be asked at `read_at`; the rest is what it said before."""
    token: str = ""
    emptied_at: float = 0.0
    """When this process learned that the server has lost its data; monotonic seconds, 0 for never."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def fresh(self) -> bool:
        """Whether it is good enough to begin a call."""
        return time.monotonic() - self.read_at <= FRESH_S

    @property
    def stuck(self) -> bool:
        """Whether a call without a time limit waits for nobody: no worker lives, and no pause says why."""
        return self.away is not None or not (self.live_workers or self.paused)

    def why_late(self, sent_at: float | None = None) -> MillstreamError:
        """The error of a call whose time is over: is the server gone, every worker dead, or all of them busy?

        `sent_at` is when its job was sent, monotonic seconds: a server that was emptied since has lost it.
        """
        if self.away:
            return copy.copy(self.away)
        if sent_at is not None and sent_at < self.emptied_at:
            return DeadlineExceeded(
                f"no answer from service {self.name!r} in time: the server was emptied and has lost the job",
                hint="call again; the server's log says whether it was restarted without its data (appendonly yes "
                "keeps it) or flushed",
            )
        if not self.live_workers:
            start = "start one with `millstream up` or `millstream worker run`"
            return NoWorkers(
                f"no worker of service {self.name!r} is alive; the job was accepted and waited in vain",
                hint=f"{start}; paused, too: {resume_hint(self.name)}" if self.paused else start,
            )
        if self.paused:
            return DeadlineExceeded(
                f"no answer from service {self.name!r} in time: it is paused", hint=resume_hint(self.name)
            )
        return DeadlineExceeded(
            f"no answer from service {self.name!r} in time, with {self.live_workers} workers alive",
            hint="see `millstream queue ls`; raise the timeout or add workers",
        )


def op_of(spec: ServiceSpec) -> str:
    """The operation that jobs of this service name. Raises InvalidRequest if this version has none for its type."""
    op = _OPS.get(spec.model.type)
    if op is None:
        raise InvalidRequest(
            f"service {spec.name!r} is of type {spec.model.type!r}, which this version cannot call yet",
            hint="embedding, reranker and custom services can be called",
        )
    return op


class Services:
    """The registry as a client sees it; thread-safe. What was read stays good while the server is away."""

    def __init__(self, connection: Connection, registry: Registry) -> None:
        self._connection = connection
        self._registry = registry
        self._asker = Asker()
        self._known: dict[str, Known] = {}
        self._only: dict[str, tuple[str, float]] = {}

    def after_fork(self) -> None:
        """In a forked child: threads of its own."""
        self._asker.after_fork()

    def close(self) -> None:
        """Ask the server nothing any more."""
        self._asker.close()

    def known(self, service: str) -> ServiceSpec | None:
        """The specification if it was read within FRESH_S; asks nobody."""
        known = self._known.get(service)
        return known.spec if known and known.fresh else None

    def read(self, service: str, until: float | None = None) -> ServiceSpec:
        """The specification of `service`; at most FRESH_S old if the server answers in time.

        Waits until `until`, monotonic seconds, at most, and for a newer description of a known service at most
        REFRESH_WAIT_S. Raises UnknownService, BrokerUnavailable.
        """
        if spec := self.known(service):
            return spec
        question = self.ask(service)
        question.wait(until)
        return question.answer().spec

    def ask(self, service: str) -> Question[Known]:
        """Ask the server about `service`; calls that ask meanwhile share its answer."""
        return self._asker.ask(service, lambda: self._read(service), self._known.get(service))

    def fingerprint(self, service: str) -> str:
        """The weights of `service` as last read; "" if no worker has said them, or the server is away."""
        known = self._known.get(service)
        return known.fingerprint if known and not known.away else ""

    def known_only(self, model_type: str) -> str | None:
        """What `only` answered within FRESH_S; asks nobody."""
        name, asked_at = self._only.get(model_type, (None, 0.0))
        return name if time.monotonic() - asked_at <= FRESH_S else None

    def only(self, model_type: str, until: float | None = None) -> str:
        """The one service of `model_type`. Waits as `read` does.

        Raises UnknownService if there is none, or more than one to list; BrokerUnavailable.
        """
        if name := self.known_only(model_type):
            return name
        question = self.ask_only(model_type)
        question.wait(until)
        return question.answer()

    def ask_only(self, model_type: str) -> Question[str]:
        """Ask the server which service is the only one of `model_type`."""
        before, _ = self._only.get(model_type, (None, 0.0))
        return self._asker.ask(("type", model_type), lambda: self._find_only(model_type), before)

    def live(self, service: str, changed: Callable[[], None]) -> int:
        """Workers that lived when the server was last asked, at least 1. Waits for nothing.

        If that was longer than FRESH_S ago the server is asked again, and `changed` is called, from another thread, if
        others live by then.
        """
        known = self._known.get(service)
        live = max(1, known.live_workers) if known else 1
        if known is None or not known.fresh:

            def answered(future: Future[Known]) -> None:
                if future.exception() is None and max(1, future.result().live_workers) != live:
                    changed()

            self.ask(service).future.add_done_callback(answered)
        return live

    def explain(self, service: str, tell: Callable[[Known], None]) -> None:
        """Call `tell` with what the server says of `service` now, soon and from any thread; at once if it just did."""
        known = self._known.get(service)
        if known and time.monotonic() - known.read_at <= REFRESH_WAIT_S:
            tell(known)
            return

        def answered(future: Future[Known]) -> None:
            error, known = future.exception(), self.last_known(service)
            tell(replace(known, away=error) if isinstance(error, MillstreamError) else known)

        self.ask(service).future.add_done_callback(answered)

    def last_known(self, service: str) -> Known:
        """What the server last said of a service that was read; `away` if a question to it has no answer yet."""
        known = self._known[service]
        if time.monotonic() - known.read_at <= REFRESH_WAIT_S:
            return known
        silent = BrokerUnavailable(
            f"Redis at {self._connection.safe_url} did not answer in time", hint="it is overloaded, frozen or cut off"
        )
        return known if known.away else replace(known, away=silent)

    def live_workers(self, service: str) -> int:
        """Workers with a beat younger than a lease, asked now. Raises UnknownService, BrokerUnavailable."""
        known = self.ask(service).future.result()
        if known.away:
            raise known.away
        return known.live_workers

    def _find_only(self, model_type: str) -> str:
        names = [name for name in self._registry.names() if self._fresh(name).spec.model.type == model_type]
        if len(names) == 1:
            self._only[model_type] = (names[0], time.monotonic())
            return names[0]
        if names:
            raise UnknownService(f"{len(names)} {model_type} services", hint=f"say service=, one of {', '.join(names)}")
        raise UnknownService(
            f"no {model_type} service on {self._connection.safe_url}",
            hint="run `millstream up` or `millstream config push`",
        )

    def _fresh(self, service: str) -> Known:
        known = self._known.get(service)
        return known if known and known.fresh else self._read(service)

    def _read(self, service: str) -> Known:
        """In the asker's thread. Raises UnknownService; BrokerUnavailable if the service was never read."""
        try:
            spec, fingerprint, token = self._registry.describe(service)
            with translated(self._connection.safe_url):
                keys = self._registry.keys(service)
                live = Lease(self._connection.client, keys).live_workers()
                paused = find_pause(self._connection.client, keys) is not None
        except BrokerUnavailable as error:
            before = self._known.get(service)
            if before is None:
                raise
            known = replace(before, read_at=time.monotonic(), away=error.with_traceback(None))
        else:
            known = Known(spec, fingerprint, live, paused, time.monotonic(), token=token)
            known = replace(known, emptied_at=self._emptied_at(known))
        self._known[service] = known
        return known

    def _emptied_at(self, known: Known) -> float:
        """When the server was last seen to have lost its data, monotonic seconds; 0 for never."""
        before = self._known.get(known.name)
        if before is None:
            return 0.0
        return known.read_at if before.token and known.token != before.token else before.emptied_at
