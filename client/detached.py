"""Calls that outlive their caller: submitted, left, and asked for later by id from any process."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from millstream.broker.codec import MAX_ROWS, decode_reply, encode_inputs
from millstream.broker.config import ServiceSpec
from millstream.broker.connection import translated
from millstream.broker.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Malformed,
    MillstreamError,
    ModelFailed,
    ResultExpired,
)
from millstream.broker.job import Draft, Json, Priority, Reply
from millstream.broker.streams import MAX_JOBS_PER_CALL, Group, Streams
from millstream.broker.submission import Submission
from millstream.client.acceptance import Acceptance
from millstream.client.orders import Cancellation
from millstream.client.result import Embeddings
from millstream.client.rows import RowOutcome, Rows
from millstream.client.split import MAX_PART_BYTES, Part

if TYPE_CHECKING:
    from millstream.client.calls import Ask, Calls

_ID = re.compile(
    r"(?P<service>[A-Za-z0-9][A-Za-z0-9_.-]{0,63}):(?P<rows>[1-9]\d{0,8})x(?P<per_job>[1-9]\d{0,3}):(?P<call>[0-9a-f]{32})"
)
_FIRST_LOOK_S, _LAST_LOOK_S = 0.005, 0.5
_LOOK_UP = 1_000
_ROOM_S = 60.0
MAX_JOBS = 100_000
"""Of one detached call."""


def id_of(service: str, rows: int, per_job: int, call: str) -> str:
    """The id of a detached call: `service:rows x rows a job:call`. `call` is the id of its first job."""
    return f"{service}:{rows}x{per_job}:{call}"


class Detached:
    """A detached call. Its `id` is all that another process needs."""

    def __init__(self, calls: Calls, service: str, rows: int, per_job: int, call: str) -> None:
        self.id = id_of(service, rows, per_job, call)
        self._calls = calls
        self._service = service
        self._parts = {
            _job_id(call, first): Part(tuple(range(first, min(first + per_job, rows))), 0)
            for first in range(0, rows, per_job)
        }
        self._replies: dict[str, Reply | MillstreamError] = {}
        self._began = time.monotonic()

    @classmethod
    def find(cls, calls: Calls, job_id: str) -> Detached:
        """The call named by `job_id`; whether it is still there only its methods say. Raises InvalidRequest."""
        match = _ID.fullmatch(job_id)
        if match is None:
            raise InvalidRequest(f"{job_id[:200]!r} is no id of a detached call", hint="such as embed:8x8:9f86d0...")
        rows, per_job = int(match["rows"]), int(match["per_job"])
        _check_jobs(rows, per_job)
        return cls(calls, match["service"], rows, per_job, match["call"])

    @classmethod
    def submit(
        cls, calls: Calls, service: str, inputs: Sequence[Json], ask: Ask, idempotency_key: str | None
    ) -> Detached:
        """Client.submit_detached."""
        from millstream.client.calls import checked, outgoing, row_sizes, tokens_of

        ask.check()
        began = time.monotonic()
        spec = calls.services.read(service, ask.until(began))
        calls.check_options(spec, ask.options)
        op, beside = checked(spec, ask)
        inputs = outgoing(spec, inputs, ask.options)
        sizes, refused = row_sizes(inputs, beside)
        if refused:
            row, error = next(iter(refused.items()))
            raise InvalidRequest(f"row {row}: {error.message}", hint=error.hint)
        if not sizes:
            raise InvalidRequest("no rows", hint="a detached call needs at least one")
        per_job = max(1, min(spec.runtime.batch_size, MAX_ROWS, MAX_PART_BYTES // max(1, *sizes.values())))
        _check_jobs(len(inputs), per_job)
        # With the shape of the call: jobs of another one would answer other rows.
        key = f"{service}\0{ask.tenant}\0{len(inputs)}x{per_job}\0{idempotency_key}"
        call = secrets.token_hex(16) if idempotency_key is None else hashlib.sha256(key.encode()).hexdigest()[:32]
        detached = cls(calls, service, len(inputs), per_job, call)
        deadline = ask.until(began)
        drafts = [
            Draft(
                id=job_id,
                op=op,
                rows=len(part.rows),
                tokens=tokens_of(spec, [sizes[row] for row in part.rows]),
                body=encode_inputs([inputs[row] for row in part.rows], ask.options),
                deadline=deadline,
                tenant=ask.tenant,
            )
            for job_id, part in detached._parts.items()
        ]
        detached._enqueue(spec, Priority(ask.priority), drafts)
        return detached

    def done(self) -> bool:
        """Whether `result` would return or raise at once. Raises ResultExpired, BrokerUnavailable."""
        self._look()
        return not self._missing()

    def result(self, timeout: float | None = None) -> Embeddings | list[Json]:
        """The results in the order of the inputs, waiting for at most `timeout` seconds.

        Raises as Handle.result, and ResultExpired where the answer's lifetime is over or there never was such a call.
        """
        self._wait(timeout)
        return self._collected().value((time.monotonic() - self._began) * 1000)

    def outcomes(self, timeout: float | None = None) -> list[RowOutcome]:
        """Each row's result or error, as values."""
        self._wait(timeout)
        return self._collected().outcomes()

    def cancel(self) -> bool:
        """Stop what is not answered; True where no worker had taken any of it. Raises BrokerUnavailable."""
        job_ids = list(self._parts)
        with translated(self._calls.connection.safe_url):
            outcomes = [
                outcome
                for at in range(0, len(job_ids), MAX_JOBS_PER_CALL)
                for outcome in self._streams().cancel(job_ids[at : at + MAX_JOBS_PER_CALL], client="")
            ]
        return all(outcome == "waiting" for outcome in outcomes)

    def _wait(self, timeout: float | None) -> None:
        until = None if timeout is None else time.monotonic() + timeout
        pause = _FIRST_LOOK_S
        while not self.done():
            if until is not None and time.monotonic() >= until:
                raise DeadlineExceeded(f"no result within {timeout} s of waiting", phase="total")
            time.sleep(pause)
            pause = min(_LAST_LOOK_S, pause * 1.5)

    def _look(self) -> None:
        """Collect the answers that have come."""
        job_ids = self._missing()[:_LOOK_UP]
        with translated(self._calls.connection.safe_url):
            found = self._streams().look_up(job_ids)
        for job_id, each in zip(job_ids, found, strict=True):
            if each.reply is not None:
                self._replies[job_id] = _decoded(each.reply)
            elif not each.known:
                raise ResultExpired(
                    f"no call {self.id!r}: its result has expired, or it was never submitted here",
                    hint="results are kept for redis.result_ttl",
                )

    def _missing(self) -> list[str]:
        return [job_id for job_id in self._parts if job_id not in self._replies]

    def _collected(self) -> Rows:
        # Made anew each time: threads, and a forked child, may ask at once.
        rows = Rows(sum(len(part.rows) for part in self._parts.values()), {})
        for job_id, part in self._parts.items():
            rows.place(part, self._replies[job_id])
        return rows

    def _enqueue(self, spec: ServiceSpec, priority: Priority, drafts: Sequence[Draft]) -> None:
        """Block until the server has accepted every job. If it does not in time, none of them stays behind."""
        ends = [time.monotonic() + _ROOM_S, *(draft.deadline for draft in drafts[:1] if draft.deadline)]
        acceptance = Acceptance([draft.id for draft in drafts], until := min(ends))
        tenant = drafts[0].tenant if spec.rate_per_tenant else ""
        submissions = [
            Submission(
                spec.name,
                Group(priority, [draft], int(not at), spec.replicated, refusals=int(not at)),
                acceptance,
                until,
                tenant,
                partial(acceptance.accepted, draft.id),
            )
            for at, draft in enumerate(drafts)
        ]
        channel = self._calls.channel
        channel.leave(submissions)
        try:
            acceptance.wait(channel.refusal_of)
        except BaseException:
            # In order behind the submissions: what waits to be sent is withdrawn, what was accepted is cancelled.
            channel.withdraw(Cancellation(spec.name, acceptance.job_ids, lambda outcomes: None, detached=True))
            raise

    def _streams(self) -> Streams:
        return self._calls.streams(self._service)


def _check_jobs(rows: int, per_job: int) -> None:
    """An id may come from anybody: it must not make a process run out of memory. Raises InvalidRequest."""
    if rows > per_job * MAX_JOBS:
        raise InvalidRequest(f"{rows} rows are more than {MAX_JOBS} jobs of {per_job}", hint="make several calls")


def _job_id(call: str, first: int) -> str:
    return call if first == 0 else hashlib.sha256(f"{call}/{first}".encode()).hexdigest()[:32]


def _decoded(reply: bytes) -> Reply | MillstreamError:
    try:
        return decode_reply(reply)
    except Malformed as error:
        return ModelFailed(f"its reply cannot be read: {error}", hint="client and worker of different versions?")
