"""Fake clients for the tests of a program that uses millstream: no server, no model, no threads.

    client = FakeClient()
    vectors = client.embed(["a stream", "a mill"])
    client.fail(QueueFull("full", retry_after=1.0))
    client = FakeClient(handlers={"reverse": lambda payloads: [each[::-1] for each in payloads]})

They check, split, order and raise with the code of the real clients. Only the queue behind it is a fake.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.thread import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import numpy as np

from millstream.broker.config.load import ServiceSpec
from millstream.broker.config.spec import ModelSpec, Runtime
from millstream.broker.contract.codec import decode_inputs, encode_reply, encode_value
from millstream.broker.contract.embedding import EmbedOptions
from millstream.broker.contract.errors import BrokerUnavailable, MillstreamError, ModelFailed, UnknownService, described
from millstream.broker.contract.job import Draft, Json, Reply, Vectors
from millstream.broker.contract.operations import BY_OP, CALL, EMBED, OPERATIONS, RERANK, ModelType
from millstream.broker.contract.vectors import shaped
from millstream.broker.queue.admission import refusal
from millstream.broker.queue.cache import Cached
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.streams import Admission, CancelOutcome, Group, Streams, Submitted
from millstream.broker.queue.submission import Submission
from millstream.broker.transport.connection import Connection
from millstream.client.aio import AsyncClient
from millstream.client.calls import NO_HITS, CallOptions, Calls
from millstream.client.channel.channel import Channel
from millstream.client.channel.requests import Cancellation
from millstream.client.client import Client
from millstream.client.detached import DetachedRequest
from millstream.client.handle import Handle
from millstream.client.job_terms import Progress
from millstream.client.row_results import RowOutcome
from millstream.client.services import Known, Services

Answers = Callable[[str], RowOutcome]
"""Function from a text to its outcome: a vector [dim], a JSON value such as a score, or an error (may be raised)."""

Handler = Callable[[list[Any]], Sequence[Any]]
"""Function of a custom service, as a worker runs it; here it gets one payload at a time."""

SERVICE, RERANKER = EMBED.op, RERANK.op
"""Names of the services that calls without `service` go to: `embed` and `rerank`."""

SERVICES: Mapping[str, ModelType] = MappingProxyType({RERANKER: RERANK.type})
"""Types of the services that are not embedding services, by name."""


@dataclass(frozen=True, slots=True)
class Call:
    """Call that was made. A map makes one for each chunk of its input."""

    service: str
    inputs: list[Json]
    opts: CallOptions
    detached: bool = False
    idempotency_key: str | None = None


def fake_vector(text: str, dim: int) -> Vectors:
    """Returns a unit vector, float32 [dim], that depends only on the text: equal on every machine."""
    digest = hashlib.shake_256(text.encode()).digest(4 * dim)
    vector = np.frombuffer(digest, dtype="<u4").astype(np.float64) / 2**31 - 1.0
    return cast(Vectors, (vector / np.linalg.norm(vector)).astype(np.float32))


def fake_score(query: str, document: str) -> float:
    """Returns the share of the query's words, between 0 and 1, that are in the document."""
    words = set(query.lower().split())
    return len(words & set(document.lower().split())) / max(1, len(words))


class FakeClient(Client):
    """Client that answers every service at once, and lists its calls in `calls`.

    A text gets a unit vector made from its hash; a document of a reranker gets the share of the query's words that it
    has. `answers` replaces both. Texts in `errors` get their error. `services` has the types of services that are not
    embedding services; "rerank" is a reranker. Names in `handlers` are custom services, answered by their function.
    """

    def __init__(
        self,
        dim: int = 384,
        answers: Answers | None = None,
        errors: Mapping[str, MillstreamError] | None = None,
        services: Mapping[str, ModelType] = SERVICES,
        handlers: Mapping[str, Handler] | None = None,
    ) -> None:
        self._calls = self._fake = _fake_calls(dim, answers, errors or {}, services, handlers or {})

    @property
    def calls(self) -> list[Call]:
        """Calls whose arguments passed the checks, in order."""
        return self._fake.made

    def fail(self, error: MillstreamError, *, times: int = 1) -> None:
        """Makes the next `times` calls fail with `error`: `embed` raises it, or the handle's `result` if submitted."""
        self._fake.faults.extend([error] * times)


class AsyncFakeClient(AsyncClient):
    """Client for asyncio that answers as FakeClient does."""

    def __init__(
        self,
        dim: int = 384,
        answers: Answers | None = None,
        errors: Mapping[str, MillstreamError] | None = None,
        services: Mapping[str, ModelType] = SERVICES,
        handlers: Mapping[str, Handler] | None = None,
    ) -> None:
        self._calls = self._fake = _fake_calls(dim, answers, errors or {}, services, handlers or {})

    @property
    def calls(self) -> list[Call]:
        """Calls as in FakeClient.calls."""
        return self._fake.made

    def fail(self, error: MillstreamError, *, times: int = 1) -> None:
        """Does as FakeClient.fail."""
        self._fake.faults.extend([error] * times)


def _fake_calls(
    dim: int,
    answers: Answers | None,
    errors: Mapping[str, MillstreamError],
    services: Mapping[str, ModelType],
    handlers: Mapping[str, Handler],
) -> _FakeCalls:
    types = {**SERVICES, **services, **dict.fromkeys(handlers, CALL.type)}
    return _FakeCalls(_FakeModel(dim, answers, errors, handlers), types)


class _FakeCalls(Calls):
    def __init__(self, model: _FakeModel, types: Mapping[str, ModelType]) -> None:
        self.made: list[Call] = []
        self.faults: deque[MillstreamError] = deque()
        self._model = model
        self._types = types
        # Error messages name it; it never connects.
        self.connection = Connection("redis://fake")
        self.registry = Registry(self.connection)
        self._detached_streams: dict[str, Streams] = {}
        self.channel = cast(Channel, _FakeChannel(model, self.faults, self.streams))
        self.services = cast(Services, _FakeServices(types))
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="millstream-fake")

    def begin(
        self,
        spec: ServiceSpec,
        inputs: Sequence[Json],
        opts: CallOptions,
        hits: Mapping[int, Cached] = NO_HITS,
        began: float | None = None,
        progress: Progress | None = None,
    ) -> Handle:
        handle = super().begin(spec, inputs, opts, hits, began, progress)
        self.made.append(Call(spec.name, list(inputs), opts))
        return handle

    def check_options(self, spec: ServiceSpec, options: Mapping[str, Json]) -> int:
        if spec.name in self._types:
            return super().check_options(spec, options)
        _embed_options(options)
        return 0

    def detached_request(
        self,
        spec: ServiceSpec,
        inputs: Sequence[Json],
        opts: CallOptions,
        deadline: float | None,
        idempotency_key: str | None,
    ) -> DetachedRequest:
        request = super().detached_request(spec, inputs, opts, deadline, idempotency_key)
        self.made.append(Call(spec.name, list(inputs), opts, True, idempotency_key))
        if self.faults:
            raise self.faults.popleft()
        return request

    def streams(self, service: str, within_s: float | None = None) -> Streams:
        return self._detached_streams.setdefault(service, cast(Streams, _FakeStreams(self._model, service)))


def _embed_options(options: Mapping[str, Json]) -> EmbedOptions:
    """Returns the options that an embedding service has. Others are ignored, since the service has no declared type."""
    return EmbedOptions.read({name: value for name, value in options.items() if name in EmbedOptions._fields})


class _FakeModel:
    def __init__(
        self,
        dim: int,
        answers: Answers | None,
        errors: Mapping[str, MillstreamError],
        handlers: Mapping[str, Handler],
    ) -> None:
        self._dim = dim
        self._answers = answers
        self._errors = errors
        self.handlers = handlers

    def reply(self, service: str, draft: Draft) -> bytes:
        """Returns the encoded reply to one job, as a worker would send it."""
        inputs, options = decode_inputs(draft.body, draft.rows)
        query = str(options["query"]) if BY_OP[draft.op].results == "scores" else None
        if handler := self.handlers.get(service):
            outcomes = [_handled(handler, payload) for payload in inputs]
        else:
            outcomes = [self._outcome(str(text), query) for text in inputs]
        errors = {row: each for row, each in enumerate(outcomes) if isinstance(each, MillstreamError)}
        good = [each for each in outcomes if not isinstance(each, MillstreamError)]
        tokens = sum(len(str(text).split()) + 2 for row, text in enumerate(inputs) if row not in errors)
        if good and all(isinstance(each, np.ndarray) for each in good):
            embed_options = _embed_options(options)
            whole = np.stack(cast(list[Vectors], good))
            vectors = shaped(whole, embed_options.dimensions, embed_options.unit(True), embed_options.encoding)
            return encode_reply(Reply(vectors=vectors, errors=errors, tokens=tokens))
        return encode_reply(Reply(values=cast(list[Json], good), errors=errors, tokens=tokens))

    def _outcome(self, text: str, query: str | None) -> RowOutcome:
        try:
            if text in self._errors:
                return self._errors[text]
            if self._answers:
                return self._answers(text)
        except MillstreamError as error:
            return error
        return fake_vector(text, self._dim) if query is None else fake_score(query, text)


def _handled(handler: Handler, payload: Json) -> RowOutcome:
    try:
        (result,) = handler([payload])
        if not isinstance(result, np.ndarray):
            encode_value(result)
    except MillstreamError as error:
        return error
    except KeyboardInterrupt:
        # A worker would answer an error, but Ctrl-C must end the test's process.
        raise
    except BaseException as error:  # noqa: BLE001 - a worker answers every error of a handler, too
        return ModelFailed(described(error))
    return cast(RowOutcome, result)


class _FakeChannel:
    client_id = "fake"
    stray_replies = 0

    def __init__(self, model: _FakeModel, faults: deque[MillstreamError], streams: Callable[[str], Streams]) -> None:
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
                submission.sink.answered(draft.id, self._model.reply(submission.service, draft))
            queue.popleft()

    def submit_detached(self, submissions: Sequence[Submission]) -> None:
        for submission in submissions:
            (admission,) = self._streams(submission.service).enqueue([submission.group])
            if error := refusal(submission.service, admission):
                submission.sink.refused(submission.job_ids, error)
            elif submission.accepted:
                submission.accepted()

    def cancel(self, cancellation: Cancellation) -> None:
        cancellation.report(["gone"] * len(cancellation.job_ids))

    cancel_detached = cancel

    def refusal_of(self, job_id: str) -> MillstreamError | None:
        return None

    def forget(self, service: str, job_ids: Sequence[str]) -> None: ...

    def flush(self, timeout: float) -> None: ...

    def close(self) -> None:
        self._closed = True


class _FakeServices:
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

    def only(self, model_type: str, until: float | None = None) -> str:
        return OPERATIONS[model_type].op

    known_only = only

    def live(self, service: str, changed: Callable[[], None]) -> int:
        return 1

    def last_known(self, service: str) -> Known:
        return Known(self.known(service), "", 1, False, 0.0)

    def explain(self, service: str, tell: Callable[[Known], None]) -> None:
        tell(self.last_known(service))

    def close(self) -> None: ...


class _FakeStreams:
    """Streams of detached jobs, which are answered when they are enqueued, each once."""

    def __init__(self, model: _FakeModel, service: str) -> None:
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

    def cancel(self, job_ids: Sequence[str], client: str, call: str = "") -> list[CancelOutcome]:
        return ["gone"] * len(job_ids)
