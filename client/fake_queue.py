"""Fake queue behind the clients for tests: a channel, services and streams that answer at once, without a server."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from millstream.broker.config.load import ServiceSpec
from millstream.broker.config.spec import ModelSpec, Runtime
from millstream.broker.contract.errors import BrokerUnavailable, MillstreamError, UnknownService
from millstream.broker.contract.operations import EMBED, GENERATE, OPERATIONS, RERANK, STREAMING_OPS, ModelType
from millstream.broker.queue.admission import refusal
from millstream.broker.queue.stream_types import Admission, CancelOutcome, Group, Submitted
from millstream.broker.queue.streams import Streams
from millstream.broker.queue.submission import Submission
from millstream.client.channel.requests import Cancellation
from millstream.client.fake_model import FakeModel, fake_deltas
from millstream.client.known import Known
from millstream.client.version_choice import Caller, Chosen

SERVICE, RERANKER, GENERATOR = EMBED.op, RERANK.op, GENERATE.op
"""Names of the services that calls without `service` go to: `embed`, `rerank` and `generate`."""

SERVICES: Mapping[str, ModelType] = MappingProxyType({RERANKER: RERANK.type, GENERATOR: GENERATE.type})
"""Types of the services that are not embedding services, by name."""


class FakeChannel:
    """Channel whose jobs are answered when they are submitted; `faults` are the errors of the next calls."""

    client_id = "fake"
    stray_replies = 0

    def __init__(self, model: FakeModel, faults: deque[MillstreamError], streams: Callable[[str], Streams]) -> None:
        self._model = model
        self._faults = faults
        self._streams = streams
        self._closed = False
        self._turn = threading.local()

    def submit(self, submissions: Sequence[Submission]) -> None:
        if self._closed:
            raise BrokerUnavailable("this client is closed", hint="make a new one")
        if queue := getattr(self._turn, "queue", None):
            # An answer makes its call submit the next jobs. A queue avoids deep recursion in long calls.
            queue.extend(submissions)
            return
        self._turn.queue = deque(submissions)
        try:
            self._answer(self._turn.queue, self._faults.popleft() if self._faults else None)
        finally:
            self._turn.queue = None

    def _answer(self, queue: deque[Submission], fault: MillstreamError | None) -> None:
        while queue:
            submission = queue[0]
            if fault:
                submission.sink.refused(submission.job_ids, fault)
            for draft in submission.group.drafts if not fault else ():
                reply = self._model.reply(submission.service, draft)
                for delta in fake_deltas(reply) if draft.op in STREAMING_OPS else ():
                    submission.sink.emitted(draft.id, delta)
                submission.sink.answered(draft.id, reply)
            queue.popleft()

    def submit_detached(self, submissions: Sequence[Submission]) -> None:
        for submission in submissions:
            (admission,) = self._streams(submission.service).enqueue([submission.group])
            if error := refusal(submission.service, submission.group.priority, admission):
                submission.sink.refused(submission.job_ids, error)
            elif submission.accepted:
                submission.accepted()

    def cancel(self, cancellation: Cancellation) -> None:
        cancellation.report(["gone"] * len(cancellation.job_ids))

    cancel_detached = cancel

    def refusal_of(self, job_id: str) -> MillstreamError | None:
        return None

    def flush(self, timeout: float) -> None: ...

    def close(self) -> None:
        self._closed = True


class FakeServices:
    """Services in which every valid name is a service with one live worker."""

    def __init__(self, types: Mapping[str, ModelType]) -> None:
        self._types = types

    def known(self, service: str, until: float | None = None) -> ServiceSpec:
        model = ModelSpec(type=self._types.get(service, EMBED.type), model_name="fake")
        try:
            return ServiceSpec(name=service, model=model, model_ref="fake", runtime=Runtime())
        except ValueError:
            raise UnknownService(f"no service {service!r}", hint="it is not a valid name of a service") from None

    read = known

    def known_target(self, name: str, until: float | None = None) -> Known:
        return self.last_known(name)

    read_target = known_target

    def choose(self, target: Known, caller: Caller) -> Chosen:
        """Returns the service; it has every version that a call asks for."""
        return Chosen(target.spec, caller.version)

    def fingerprint(self, service: str) -> str:
        return ""

    def only(self, model_type: str, until: float | None = None) -> str:
        return OPERATIONS[model_type].op

    known_only = only

    def live(self, service: str, changed: Callable[[], None]) -> int:
        return 1

    def last_known(self, service: str) -> Known:
        return Known(self.known(service), "", 1, False, time.monotonic())

    def explain(self, service: str, tell: Callable[[Known], None]) -> None:
        tell(self.last_known(service))

    def close(self) -> None: ...


class FakeStreams:
    """Streams of detached jobs, which are answered when they are enqueued, each once."""

    def __init__(self, model: FakeModel, service: str) -> None:
        self._model = model
        self._service = service
        self._lock = threading.Lock()
        self._calls: dict[str, tuple[str, dict[str, bytes]]] = {}

    def enqueue(self, groups: Sequence[Group]) -> list[Admission]:
        with self._lock:
            return [self._accept(group) for group in groups]

    def _accept(self, group: Group) -> Admission:
        assert group.call
        payload, replies = self._calls.setdefault(group.call.id, (group.call.payload, {}))
        if payload != group.call.payload:
            return Admission("reused_key")
        for draft in group.drafts:
            if draft.id not in replies:
                replies[draft.id] = self._model.reply(self._service, draft)
        return Admission()

    def submitted(self, call: str) -> Submitted | None:
        payload, replies = self._calls.get(call, ("", {}))
        return Submitted(payload, len(replies)) if replies else None

    def results(self, call: str, job_ids: Sequence[str]) -> list[bytes | None]:
        _, replies = self._calls[call]
        return [replies.get(job_id) for job_id in job_ids]

    def forget(self, call: str) -> None:
        self._calls.pop(call, None)

    def partials(self, job_ids: Sequence[str]) -> list[bytes]:
        return [b""] * len(job_ids)

    def cancel(self, job_ids: Sequence[str], client: str, call: str = "") -> list[CancelOutcome]:
        return ["gone"] * len(job_ids)
