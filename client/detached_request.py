"""Request for a detached call: checked, named, and submitted until the server has accepted its jobs."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from millstream.broker.config.load import ServiceSpec
from millstream.broker.contract.codec import JsonText, encode_inputs
from millstream.broker.contract.entry_codec import MAX_ROWS
from millstream.broker.contract.errors import BrokerUnavailable, InvalidRequest, MillstreamError
from millstream.broker.contract.job import Draft, Json, Priority
from millstream.broker.contract.operations import BY_OP, Operation
from millstream.broker.queue.stream_types import DetachedCall, Group
from millstream.broker.queue.streams import MAX_JOBS_PER_CALL
from millstream.broker.queue.submission import Submission
from millstream.broker.transport.connection import translated
from millstream.client.acceptance import Acceptance
from millstream.client.call_options import CallOptions
from millstream.client.call_spans import begin_span, failed
from millstream.client.channel.requests import Cancellation
from millstream.client.detached import Detached, DetachedCalls
from millstream.client.detached_id import DetachedId
from millstream.client.rows import encode_rows, estimate_row_tokens, measure_rows
from millstream.client.split import MAX_PART_BYTES, Part
from millstream.telemetry.traces import CallSpan, Ending

_PAYLOAD = re.compile(r"(?P<rows>\d+)x(?P<per_job>\d+) (?P<rest>.*)")
"""Payload that the server stores with a call: its shape, digest and webhook; no digest without an idempotency key."""


class PendingDetached:
    """Detached call whose jobs are being submitted."""

    def __init__(self, detached: Detached, acceptance: Acceptance, withdraw: Callable[[], None]) -> None:
        self.acceptance = acceptance
        self._detached = detached
        self._withdraw = withdraw

    def wait(self) -> Detached:
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
        spec: ServiceSpec,
        operation: Operation,
        inputs: Sequence[Json],
        beside: int,
        opts: CallOptions,
        deadline: float | None,
        idempotency_key: str | None,
    ) -> DetachedRequest:
        """Checks the inputs of a detached call. `beside` is as in measure_rows. Raises InvalidRequest."""
        inputs = encode_rows(operation, inputs)
        sizes, refused = measure_rows(inputs, beside)
        if refused:
            row, error = next(iter(refused.items()))
            raise InvalidRequest(f"row {row}: {error.message}", hint=error.hint)
        if not sizes:
            raise InvalidRequest("no rows", hint="a detached call needs at least one")
        most_rows = 1 if spec.model.operation.streams else min(spec.runtime.batch_size, MAX_ROWS)
        per_job = max(1, min(most_rows, MAX_PART_BYTES // max(1, *sizes.values())))
        request = cls(spec, operation.op, inputs, sizes, opts, deadline, idempotency_key, per_job)
        # Raises if the call has too many jobs.
        request._name(per_job)
        return request

    def __post_init__(self) -> None:
        """Sets the call's id and digest."""
        call = secrets.token_hex(16) if self.key is None else name_call(self.spec.name, self.opts.tenant, self.key)
        object.__setattr__(self, "call", call)
        object.__setattr__(self, "digest", "" if self.key is None else self._compute_digest())

    def begin(self, calls: DetachedCalls, per_job: int) -> PendingDetached:
        """Submits its jobs, `per_job` rows each, and returns at once."""
        detached_id = self._name(per_job)
        span = self._begin_span(calls)
        drafts = self.draft_jobs(detached_id.split(), span.traceparent if span else "")

        def note_end(error: MillstreamError | None) -> None:
            if span:
                span.end(failed(error) if error else Ending())

        make = self._prepare_submission(drafts, per_job)
        acceptance = Acceptance(calls.channel, drafts, make, self.deadline, note_end)

        def withdraw() -> None:
            note_end(BrokerUnavailable("its jobs were not accepted in time"))
            job_ids = [draft.id for draft in drafts] if self.key is None else []
            for at in range(0, len(job_ids), MAX_JOBS_PER_CALL):
                page = job_ids[at : at + MAX_JOBS_PER_CALL]
                calls.channel.cancel_detached(Cancellation(self.spec.name, page, lambda outcomes: None, call=self.call))

        return PendingDetached(Detached(calls, detached_id, BY_OP[self.op].results), acceptance, withdraw)

    def _begin_span(self, calls: DetachedCalls) -> CallSpan | None:
        operation, opts = BY_OP[self.op], self.opts
        span = begin_span(calls.tracing, self.spec, operation, self.inputs, opts.priority, calls.channel.client_id)
        if span:
            span.name(self.call)
        return span

    def _name(self, per_job: int) -> DetachedId:
        return DetachedId(self.spec.name, len(self.inputs), per_job, self.call)

    def _compute_digest(self) -> str:
        """Returns a digest of operation, options and inputs. It does not depend on the rows per job."""
        digest = hashlib.sha256(json.dumps([self.op, dict(self.opts.options)], sort_keys=True).encode())
        for row in self.inputs:
            digest.update(b"\0" + encode_inputs([_sort_keys(row)], {}))
        return digest.hexdigest()[:32]

    @property
    def _identity(self) -> str:
        """Digest, and webhook if it has one. With another identity it is another call under the same key."""
        return f"{self.digest} {self.opts.webhook}" if self.opts.webhook else self.digest

    def _make_record(self, per_job: int, jobs: int) -> DetachedCall:
        """Returns the record of the call that the server stores."""
        payload = f"{self._name(per_job).shape} {self._identity}"
        return DetachedCall(self.call, jobs, payload, max(1, round(self.spec.result_ttl * 1000)))

    def find_other_per_job(self, calls: DetachedCalls) -> int | None:
        """Returns the rows per job with which this payload was accepted under its key; None if it is `per_job`.

        Returns None, too, if this payload was not accepted.
        """
        if self.key is None:
            return None
        with translated(calls.connection.safe_url):
            submitted = calls.streams(self.spec.name).submitted(self.call)
        match = _PAYLOAD.fullmatch(submitted.payload) if submitted else None
        if match is None or match["rest"] != self._identity or int(match["per_job"]) == self.per_job:
            return None
        return int(match["per_job"])

    def draft_jobs(self, parts: Mapping[str, Part], trace: str = "") -> list[Draft]:
        """Returns the job of each part, by job id. `trace` is the context of the call's span."""
        return [
            Draft(
                job_id,
                self.op,
                len(part.rows),
                estimate_row_tokens(self.spec, [self.sizes[row] for row in part.rows]),
                encode_inputs([self.inputs[row] for row in part.rows], self.opts.options),
                deadline=self.deadline,
                tenant=self.opts.tenant,
                trace=trace,
            )
            for job_id, part in parts.items()
        ]

    def _prepare_submission(
        self, drafts: Sequence[Draft], per_job: int
    ) -> Callable[[Draft, float, Acceptance], Submission]:
        """Returns a function that makes the submission of one job.

        Jobs are admitted one by one, as the queue has room. The first one is charged for the call.
        """
        record, priority = self._make_record(per_job, len(drafts)), Priority(self.opts.priority)
        tenant = self.opts.tenant if self.spec.limits_tenants else ""
        first = drafts[0].id

        def make(draft: Draft, until: float, acceptance: Acceptance) -> Submission:
            calls = int(draft.id == first)
            group = Group(priority, [draft], calls, self.spec.replicated, calls, record)
            on_accepted = partial(acceptance.accepted, draft.id)
            return Submission(self.spec.name, group, acceptance, until, tenant, on_accepted)

        return make


def name_call(service: str, tenant: str, key: str) -> str:
    """Returns the id of a call with an idempotency key: 32 hexadecimal digits."""
    return hashlib.sha256(f"{service}\0{tenant}\0{key}".encode()).hexdigest()[:32]


def _sort_keys(row: Json) -> Json:
    """Returns a payload with sorted object keys, so that equal payloads have equal digests."""
    return json.dumps(json.loads(row), sort_keys=True) if isinstance(row, JsonText) else row
