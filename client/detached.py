"""Detached calls: they go on without the process that submitted them. Any process gets the results by the call's id."""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from millstream.broker.config.load import ServiceSpec
from millstream.broker.contract.codec import MAX_ROWS, JsonText, decode_reply, encode_inputs
from millstream.broker.contract.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    InvalidRequest,
    Malformed,
    MillstreamError,
    ModelFailed,
    ResultExpired,
)
from millstream.broker.contract.job import Draft, Json, Priority, Reply
from millstream.broker.queue.streams import MAX_JOBS_PER_CALL, DetachedCall, Group, Streams
from millstream.broker.queue.submission import Submission, draft_job
from millstream.broker.transport.connection import is_transient, translated
from millstream.client.acceptance import Acceptance
from millstream.client.channel.requests import Cancellation
from millstream.client.job_terms import waits_until
from millstream.client.result import Embeddings
from millstream.client.row_results import RowOutcome, RowResults
from millstream.client.split import MAX_PART_BYTES, Part

if TYPE_CHECKING:
    from millstream.client.calls import CallOptions, Calls

_ID = re.compile(
    r"(?P<service>[A-Za-z0-9][A-Za-z0-9_.-]{0,63}):(?P<rows>[1-9]\d{0,8})x(?P<per_job>[1-9]\d{0,3}):(?P<call>[0-9a-f]{32})"
)
_FIRST_LOOK_S, _LAST_LOOK_S = 0.005, 0.5
"""Seconds between the first two looks for results, and between the last ones of a long wait."""

_LOOK_UP = 128
"""Jobs whose replies one command reads. A reply may be as large as MAX_PART_BYTES."""

LOOK_S = 0.25
"""Seconds without a byte from the server after which a look for results is given up and tried again."""

AWAY_S = 5.0
"""Seconds for which the server may be unreachable before a wait for results raises BrokerUnavailable."""

MAX_JOBS = 100_000
"""Jobs that one detached call has at most."""

_PAYLOAD = re.compile(r"(?P<rows>\d+)x(?P<per_job>\d+) (?P<digest>[0-9a-f]*)")
"""Payload that the server stores with a call: its shape and digest; no digest for calls without an idempotency key."""


def id_of(service: str, rows: int, per_job: int, call: str) -> str:
    """Returns the id of a detached call: `service:ROWSxROWS_PER_JOB:call`. `call` is the id of its first job."""
    return f"{service}:{rows}x{per_job}:{call}"


class Detached:
    """Detached call. Another process needs only its `id`."""

    def __init__(self, calls: Calls, service: str, rows: int, per_job: int, call: str) -> None:
        self.id = id_of(service, rows, per_job, call)
        self._calls = calls
        self._service = service
        self._call = call
        self._shape = f"{rows}x{per_job} "
        self._parts = {
            _job_id(call, first): Part(tuple(range(first, min(first + per_job, rows))), 0)
            for first in range(0, rows, per_job)
        }
        self._replies: dict[str, Reply | MillstreamError] = {}
        self._began = time.monotonic()

    @classmethod
    def find(cls, calls: Calls, job_id: str) -> Detached:
        """Returns the call with this id, without asking the server: its methods raise ResultExpired if it is gone.

        Raises InvalidRequest if `job_id` is not an id of a detached call.
        """
        match = _ID.fullmatch(job_id) if isinstance(job_id, str) else None
        if match is None:
            named = str(job_id)[:200]
            raise InvalidRequest(f"{named!r} is no id of a detached call", hint="such as embed:8x8:9f86d0...")
        rows, per_job = int(match["rows"]), int(match["per_job"])
        _check_jobs(rows, per_job)
        return cls(calls, match["service"], rows, per_job, match["call"])

    @classmethod
    def submit(
        cls, calls: Calls, service: str, inputs: Sequence[Json], opts: CallOptions, idempotency_key: str | None
    ) -> Detached:
        """Does as Client.submit_detached, with `opts`."""
        opts = opts.checked()
        began = time.monotonic()
        spec = calls.services.read(service, opts.until(began))
        request = calls.detached_request(spec, inputs, opts, opts.until(began), idempotency_key)
        try:
            return request.begin(calls, request.per_job).accepted()
        except InvalidRequest:
            per_job = request.accepted_per_job(calls)
            if per_job in (None, request.per_job):
                raise
            # The same payload was submitted with this key before the service's batch size was changed.
            return request.begin(calls, per_job).accepted()

    def done(self) -> bool:
        """Returns whether `result` would return or raise at once. Raises ResultExpired, BrokerUnavailable."""
        self._look(self._streams())
        return not self._missing()

    def result(self, timeout: float | None = None) -> Embeddings | list[Json]:
        """Waits for at most `timeout` seconds and returns the results in the order of the inputs.

        Raises as Handle.result does, and ResultExpired if the results have expired or there never was such a call.
        """
        self._wait(timeout)
        return self._collected().value((time.monotonic() - self._began) * 1000)

    def outcomes(self, timeout: float | None = None) -> list[RowOutcome]:
        """Waits as `result` does, and returns each row's result or error as a value."""
        self._wait(timeout)
        return self._collected().outcomes()

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

    def _wait(self, timeout: float | None) -> None:
        limit = waits_until(timeout)
        until = math.inf if limit is None else limit
        pause, streams = _FIRST_LOOK_S, self._calls.streams(self._service, LOOK_S)
        away_since: float | None = None
        while self._missing():
            try:
                self._look(streams)
                away_since = None
            except BrokerUnavailable as error:
                away_since = away_since or time.monotonic()
                if not is_transient(error) or time.monotonic() >= min(until, away_since + AWAY_S):
                    raise
            if self._missing():
                if time.monotonic() >= until:
                    raise DeadlineExceeded(f"no result within {timeout} s of waiting", phase="total")
                time.sleep(pause)
                pause = min(_LAST_LOOK_S, pause * 1.5)

    def _look(self, streams: Streams) -> None:
        """Reads the answers that are there. Raises ResultExpired, BrokerUnavailable."""
        missing = self._missing()
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
                        self._replies[job_id] = _decoded(reply)

    def _missing(self) -> list[str]:
        return [job_id for job_id in self._parts if job_id not in self._replies]

    def _collected(self) -> RowResults:
        # New for each result: several threads, and a forked child, may ask at the same time.
        rows = RowResults(sum(len(part.rows) for part in self._parts.values()), {})
        for job_id, part in self._parts.items():
            rows.place(part, self._replies[job_id])
        return rows

    def _streams(self) -> Streams:
        return self._calls.streams(self._service)


class Entering:
    """Detached call whose jobs are being submitted."""

    def __init__(self, detached: Detached, acceptance: Acceptance, withdraw: Callable[[], None]) -> None:
        self.acceptance = acceptance
        self._detached = detached
        self._withdraw = withdraw

    def accepted(self) -> Detached:
        """Waits until the server has accepted all jobs, and returns the call. If it raises, the call is withdrawn.

        Jobs of a call with an idempotency key are not withdrawn: another client may wait for them, and the same call
        again submits the missing ones.
        """
        try:
            self.acceptance.wait()
        except BaseException:
            self.give_up()
            raise
        return self._detached

    def give_up(self) -> None:
        """Withdraws the call: its caller will not get it."""
        with suppress(BrokerUnavailable):
            self._withdraw()


@dataclass(frozen=True, slots=True)
class DetachedRequest:
    """Checked request for a detached call. `per_job` is the number of rows that a job has at most now.

    `call` is the id of the call: equal for equal services, tenants and idempotency keys, random without a key.
    """

    spec: ServiceSpec
    op: str
    inputs: Sequence[Json]
    sizes: Mapping[int, int]
    opts: CallOptions
    deadline: float | None
    key: str | None
    per_job: int
    call: str = field(init=False)
    digest: str = field(init=False)

    @classmethod
    def of(
        cls,
        calls: Calls,
        spec: ServiceSpec,
        inputs: Sequence[Json],
        opts: CallOptions,
        deadline: float | None,
        idempotency_key: str | None,
    ) -> DetachedRequest:
        """Checks the inputs and options of a detached call. Raises InvalidRequest."""
        from millstream.client.calls import find_operation, outgoing, row_sizes

        operation = find_operation(spec, opts.op)
        beside = calls.check_options(spec, opts.options)
        inputs = outgoing(operation, inputs)
        sizes, refused = row_sizes(inputs, beside)
        if refused:
            row, error = next(iter(refused.items()))
            raise InvalidRequest(f"row {row}: {error.message}", hint=error.hint)
        if not sizes:
            raise InvalidRequest("no rows", hint="a detached call needs at least one")
        per_job = max(1, min(spec.runtime.batch_size, MAX_ROWS, MAX_PART_BYTES // max(1, *sizes.values())))
        _check_jobs(len(inputs), per_job)
        return cls(spec, operation.op, inputs, sizes, opts, deadline, idempotency_key, per_job)

    def __post_init__(self) -> None:
        """Sets the call's id and digest."""
        named = f"{self.spec.name}\0{self.opts.tenant}\0{self.key}".encode()
        call = secrets.token_hex(16) if self.key is None else hashlib.sha256(named).hexdigest()[:32]
        object.__setattr__(self, "call", call)
        object.__setattr__(self, "digest", "" if self.key is None else self._digest())

    def begin(self, calls: Calls, per_job: int) -> Entering:
        """Submits its jobs, `per_job` rows each, and returns at once."""
        detached = Detached(calls, self.spec.name, len(self.inputs), per_job, self.call)
        drafts = self.drafts(detached._parts)
        acceptance = Acceptance(calls.channel, drafts, self._submission(drafts, per_job), self.deadline)

        def withdraw() -> None:
            job_ids = [draft.id for draft in drafts] if self.key is None else []
            for at in range(0, len(job_ids), MAX_JOBS_PER_CALL):
                page = job_ids[at : at + MAX_JOBS_PER_CALL]
                calls.channel.cancel_detached(Cancellation(self.spec.name, page, lambda outcomes: None, call=self.call))

        return Entering(detached, acceptance, withdraw)

    def _digest(self) -> str:
        """Returns a digest of operation, options and inputs. It does not depend on the rows per job."""
        digest = hashlib.sha256(json.dumps([self.op, dict(self.opts.options)], sort_keys=True).encode())
        for row in self.inputs:
            digest.update(b"\0" + encode_inputs([_sorted(row)], {}))
        return digest.hexdigest()[:32]

    def record(self, per_job: int, jobs: int) -> DetachedCall:
        """Returns the record of the call that the server stores."""
        payload = f"{len(self.inputs)}x{per_job} {self.digest}"
        return DetachedCall(self.call, jobs, payload, max(1, round(self.spec.result_ttl * 1000)))

    def accepted_per_job(self, calls: Calls) -> int | None:
        """Returns the rows per job with which this payload was accepted under its key; None if it was not."""
        if self.key is None:
            return None
        with translated(calls.connection.safe_url):
            submitted = calls.streams(self.spec.name).submitted(self.call)
        match = _PAYLOAD.fullmatch(submitted.payload) if submitted else None
        return int(match["per_job"]) if match and match["digest"] == self.digest else None

    def drafts(self, parts: Mapping[str, Part]) -> list[Draft]:
        """Returns the job of each part, by job id."""
        from millstream.client.calls import tokens_of

        return [
            draft_job(
                job_id,
                self.op,
                [self.inputs[row] for row in part.rows],
                tokens_of(self.spec, [self.sizes[row] for row in part.rows]),
                self.opts.options,
                deadline=self.deadline,
                tenant=self.opts.tenant,
            )
            for job_id, part in parts.items()
        ]

    def _submission(self, drafts: Sequence[Draft], per_job: int) -> Callable[[Draft, float, Acceptance], Submission]:
        """Returns a function that makes the submission of one job.

        Jobs are admitted one by one, as the queue has room. The first one is charged for the call.
        """
        record, priority = self.record(per_job, len(drafts)), Priority(self.opts.priority)
        tenant = self.opts.tenant if self.spec.rate_per_tenant else ""
        first = drafts[0].id

        def make(draft: Draft, until: float, acceptance: Acceptance) -> Submission:
            calls = int(draft.id == first)
            group = Group(priority, [draft], calls, self.spec.replicated, calls, record)
            on_accepted = partial(acceptance.accepted, draft.id)
            return Submission(self.spec.name, group, acceptance, until, tenant, on_accepted)

        return make


def _sorted(row: Json) -> Json:
    """Returns a payload with sorted object keys, so that equal payloads have equal digests."""
    return json.dumps(json.loads(row), sort_keys=True) if isinstance(row, JsonText) else row


def _check_jobs(rows: int, per_job: int) -> None:
    """Raises InvalidRequest if the call has more than MAX_JOBS jobs.

    An id is untrusted input: one with too many jobs must not exhaust the memory of the process.
    """
    if rows > per_job * MAX_JOBS:
        raise InvalidRequest(f"{rows} rows are more than {MAX_JOBS} jobs of {per_job}", hint="make several calls")


def _job_id(call: str, first: int) -> str:
    return call if first == 0 else hashlib.sha256(f"{call}/{first}".encode()).hexdigest()[:32]


def _decoded(reply: bytes) -> Reply | MillstreamError:
    try:
        return decode_reply(reply)
    except Malformed as error:
        return ModelFailed(f"its reply cannot be read: {error}", hint="client and worker of different versions?")
