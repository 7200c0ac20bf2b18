"""Detached calls: they go on without the process that submitted them. Any process gets the results by the call's id."""

from __future__ import annotations

import math
import time
from typing import Protocol

from millstream.broker.contract.codec import decode_reply
from millstream.broker.contract.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    InvalidRequest,
    Malformed,
    MillstreamError,
    ModelFailed,
    ResultExpired,
    UnknownService,
)
from millstream.broker.contract.job import Json, Reply
from millstream.broker.contract.operations import ResultKind
from millstream.broker.contract.partial import decode_records, text_of
from millstream.broker.queue.streams import MAX_JOBS_PER_CALL, Streams
from millstream.broker.transport.connection import Connection, is_transient, translated
from millstream.client.channel.channel import Channel
from millstream.client.detached_id import DetachedId
from millstream.client.job_terms import waits_until
from millstream.client.result import Embeddings, generations
from millstream.client.row_results import RowOutcome, RowResults
from millstream.client.services import Services
from millstream.telemetry.traces import Tracing

_FIRST_LOOK_S, _LAST_LOOK_S = 0.005, 0.5
"""Seconds between the first two looks for results, and between the last ones of a long wait."""

_LOOK_UP = 128
"""Jobs whose replies one command reads. A reply may be as large as MAX_PART_BYTES."""

LOOK_S = 0.25
"""Seconds without a byte from the server after which a look for results is given up and tried again."""

AWAY_S = 5.0
"""Seconds for which the server may be unreachable before a wait for results raises BrokerUnavailable."""


class DetachedCalls(Protocol):
    """Part of Calls that a detached call uses."""

    connection: Connection
    channel: Channel
    services: Services
    tracing: Tracing

    def streams(self, service: str, within_s: float | None = None) -> Streams: ...


class Detached:
    """Detached call. Another process needs only its `id`."""

    def __init__(self, calls: DetachedCalls, detached_id: DetachedId, kind: ResultKind | None = None) -> None:
        """Takes the `kind` of the results; None if only the server knows it."""
        self.id = str(detached_id)
        self._calls = calls
        self._service = detached_id.service
        self._call = detached_id.call
        self._shape = f"{detached_id.shape} "
        self._parts = detached_id.split()
        self._replies: dict[str, Reply | MillstreamError] = {}
        self._kind = kind
        self._began = time.monotonic()

    @classmethod
    def find(cls, calls: DetachedCalls, job_id: str) -> Detached:
        """Returns the call with this id, without asking the server: its methods raise ResultExpired if it is gone.

        Raises InvalidRequest if `job_id` is not an id of a detached call.
        """
        return cls(calls, DetachedId.parse(job_id))

    def done(self) -> bool:
        """Returns whether `result` would return or raise at once. Raises ResultExpired, BrokerUnavailable."""
        self._look(self._streams())
        return not self._find_missing()

    def result(self, timeout: float | None = None) -> Embeddings | list[Json]:
        """Waits for at most `timeout` seconds and returns the results in the order of the inputs.

        Raises as Handle.result does, and ResultExpired if the results have expired or there never was such a call.
        """
        self._wait(timeout)
        return self._collect().value((time.monotonic() - self._began) * 1000)

    def outcomes(self, timeout: float | None = None) -> list[RowOutcome]:
        """Waits as `result` does, and returns each row's result or error as a value."""
        self._wait(timeout)
        return self._collect().outcomes()

    def cancel(self) -> bool:
        """Cancels all unanswered jobs. Returns True if no worker had claimed any. Raises BrokerUnavailable."""
        job_ids = list(self._parts)
        with translated(self._calls.connection.safe_url):
            outcomes = [
                outcome
                for at in range(0, len(job_ids), MAX_JOBS_PER_CALL)
                for outcome in self._streams().cancel(job_ids[at : at + MAX_JOBS_PER_CALL], "", self._call)
            ]
        return all(outcome == "waiting" for outcome in outcomes)

    @property
    def jobs(self) -> int:
        """Number of jobs of the call."""
        return len(self._parts)

    @property
    def answered(self) -> int:
        """Number of jobs whose answers were read so far."""
        return len(self._replies)

    @property
    def fingerprints(self) -> frozenset[str]:
        """Fingerprints of the weights that made the answers which were read so far."""
        replies = [reply for reply in self._replies.values() if isinstance(reply, Reply)]
        return frozenset(reply.fingerprint for reply in replies) - {""}

    def row_tokens(self) -> list[int]:
        """Returns the tokens that the model ran for each row: those of the row's job, divided evenly. 0: none known."""
        tokens = [0] * sum(len(part.rows) for part in self._parts.values())
        for job_id, part in self._parts.items():
            reply = self._replies.get(job_id)
            each, rest = divmod(reply.tokens if isinstance(reply, Reply) else 0, max(1, len(part.rows)))
            for at, row in enumerate(part.rows):
                tokens[row] = each + (at < rest)
        return tokens

    def forget(self) -> None:
        """Frees the server's memory of a call that is done: its results expire now. Raises BrokerUnavailable."""
        with translated(self._calls.connection.safe_url):
            self._streams().forget(self._call)

    def _wait(self, timeout: float | None) -> None:
        limit = waits_until(timeout)
        until = math.inf if limit is None else limit
        pause, streams = _FIRST_LOOK_S, self._calls.streams(self._service, LOOK_S)
        away_since: float | None = None
        while self._find_missing():
            try:
                self._look(streams)
                away_since = None
            except BrokerUnavailable as error:
                away_since = away_since or time.monotonic()
                if not is_transient(error) or time.monotonic() >= min(until, away_since + AWAY_S):
                    raise
            if self._find_missing():
                if time.monotonic() >= until:
                    raise DeadlineExceeded(f"no result within {timeout} s of waiting", phase="total")
                time.sleep(pause)
                pause = min(_LAST_LOOK_S, pause * 1.5)

    def partial(self) -> str:
        """Returns the text so far of a call of one row, if its service streams; the whole text once the call is done.

        Raises InvalidRequest if the call has more rows, the call's error if it failed, ResultExpired,
        BrokerUnavailable.
        """
        (job_id, part), *others = self._parts.items()
        if others or len(part.rows) > 1:
            raise InvalidRequest("only a call of one row has a text so far", hint="`outcomes` has each row's result")
        streams = self._streams()
        self._look(streams)
        if self._find_missing():
            with translated(self._calls.connection.safe_url):
                (records,) = streams.partials([job_id])
            if records:
                return _text_so_far(records)
            # Settling a job deletes its records.
            self._look(streams)
        return "" if self._find_missing() else generations(self._collect().value(0.0))[0].text

    def _look(self, streams: Streams) -> None:
        """Reads the answers that are there. Raises ResultExpired, BrokerUnavailable."""
        missing = self._find_missing()
        if not missing:
            return
        with translated(self._calls.connection.safe_url):
            submitted = streams.submitted(self._call)
            # If the call has another shape than the id says, the id's job ids were never submitted.
            if submitted is None or not submitted.payload.startswith(self._shape):
                raise ResultExpired(
                    f"no call {self.id!r}: its result has expired, or it was never submitted here",
                    hint="results are kept for redis.result_ttl",
                )
            if submitted.answered <= len(self._parts) - len(missing):
                return
            for at in range(0, len(missing), _LOOK_UP):
                page = missing[at : at + _LOOK_UP]
                for job_id, reply in zip(page, streams.results(self._call, page), strict=True):
                    if reply is not None:
                        self._replies[job_id] = _decode(reply)

    def _find_missing(self) -> list[str]:
        return [job_id for job_id in self._parts if job_id not in self._replies]

    def _collect(self) -> RowResults:
        # New for each result: several threads, and a forked child, may ask at the same time.
        # Only texts are read: other results are given as the server has them.
        kind: ResultKind = "generations" if self._find_kind() == "generations" else "any"
        rows = RowResults(sum(len(part.rows) for part in self._parts.values()), {}, kind)
        for job_id, part in self._parts.items():
            rows.place(part, self._replies[job_id])
        return rows

    def _find_kind(self) -> ResultKind:
        """Returns the kind of the results. Asks the server if the call may be one for texts, made by another process.

        Raises BrokerUnavailable.
        """
        if self._kind is None:
            replies = [reply for reply in self._replies.values() if isinstance(reply, Reply)]
            if not any(isinstance(value, dict) for reply in replies for value in reply.values or ()):
                return "any"
            try:
                self._kind = self._calls.services.read(self._service).model.operation.results
            except UnknownService:
                # The results outlive the service.
                return "any"
        return self._kind

    def _streams(self) -> Streams:
        return self._calls.streams(self._service)


def _decode(reply: bytes) -> Reply | MillstreamError:
    try:
        return decode_reply(reply)
    except Malformed as error:
        return ModelFailed(f"its reply cannot be read: {error}", hint="client and worker of different versions?")


def _text_so_far(records: bytes) -> str:
    try:
        return text_of(decode_records(records))
    except Malformed as error:
        raise ModelFailed(
            f"its text cannot be read: {error}", hint="client and worker of different versions?"
        ) from error
