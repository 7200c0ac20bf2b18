"""Fake clients for the tests of a program that uses millstream: no server, no model, no threads.

    client = FakeClient()
    vectors = client.embed(["a stream", "a mill"])
    client.fail(QueueFull("full", retry_after=1.0))
    client = FakeClient(handlers={"reverse": lambda payloads: [each[::-1] for each in payloads]})

They check, split, order and raise with the code of the real clients. Only the queue behind it is a fake.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures.thread import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

from millstream.broker.config.load import ServiceSpec
from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.job import PRIORITIES, Json
from millstream.broker.contract.operations import CALL, OPERATIONS, ModelType
from millstream.broker.queue.cache import Cached
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.streams import Streams
from millstream.broker.transport.connection import Connection
from millstream.client.aio import AsyncClient
from millstream.client.async_calls import AsyncCalls
from millstream.client.cache_reader import CacheReader
from millstream.client.call_options import CallOptions, read_webhook
from millstream.client.calls import NO_HITS, Calls
from millstream.client.channel.channel import Channel
from millstream.client.client import Client
from millstream.client.detached_request import DetachedRequest
from millstream.client.fake_model import (
    FAKE_VERSION,
    Answers,
    FakeModel,
    Handler,
    fake_score,
    fake_vector,
    read_embed_options,
)
from millstream.client.fake_queue import GENERATOR, RERANKER, SERVICE, SERVICES, FakeChannel, FakeServices, FakeStreams
from millstream.client.growing_text import GrowingText
from millstream.client.handle import Handle
from millstream.client.job_terms import Progress
from millstream.client.services import Services
from millstream.client.shadow_counts import ShadowCounts
from millstream.client.shadows import Shadows
from millstream.client.stats import ServiceStats
from millstream.client.version_choice import Chosen

__all__ = [
    "FAKE_VERSION",
    "GENERATOR",
    "RERANKER",
    "SERVICE",
    "SERVICES",
    "Answers",
    "AsyncFakeClient",
    "Call",
    "FakeClient",
    "Handler",
    "fake_score",
    "fake_vector",
]


@dataclass(frozen=True, slots=True)
class Call:
    """Call that was made. A map makes one for each chunk of its input."""

    service: str
    inputs: list[Json]
    opts: CallOptions
    detached: bool = False
    idempotency_key: str | None = None


class FakeClient(Client):
    """Client that answers every service at once, and lists its calls in `calls`.

    A text gets a unit vector made from its hash; a document of a reranker gets the share of the query's words that it
    has. `answers` replaces them. Texts in `errors` get their error. `services` has the types of services that are not
    embedding services; "rerank" is a reranker. Names in `handlers` are custom services, answered by their function.

    A service of type "llm" generates the prompt's own text, of a conversation the last message's; each word counts as
    a token. `answers` and `handlers` give other texts. "generate" is such a service. A service of type "echo-stream"
    gives its handler's text, or the payload itself. Both give texts word by word if they are streamed.
    """

    def __init__(
        self,
        dim: int = 384,
        answers: Answers | None = None,
        errors: Mapping[str, MillstreamError] | None = None,
        services: Mapping[str, ModelType] = SERVICES,
        handlers: Mapping[str, Handler] | None = None,
    ) -> None:
        self._calls = self._fake = _make_calls(dim, answers, errors or {}, services, handlers or {})

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
        self._calls = self._fake = _make_calls(dim, answers, errors or {}, services, handlers or {})
        self._async_calls = AsyncCalls(self._calls)

    @property
    def calls(self) -> list[Call]:
        """Calls as in FakeClient.calls."""
        return self._fake.made

    def fail(self, error: MillstreamError, *, times: int = 1) -> None:
        """Does as FakeClient.fail."""
        self._fake.faults.extend([error] * times)


def _make_calls(
    dim: int,
    answers: Answers | None,
    errors: Mapping[str, MillstreamError],
    services: Mapping[str, ModelType],
    handlers: Mapping[str, Handler],
) -> _FakeCalls:
    streaming = {each.type for each in OPERATIONS.values() if each.streams}
    custom = dict.fromkeys([name for name in handlers if services.get(name) not in streaming], CALL.type)
    types = {**SERVICES, **services, **custom}
    return _FakeCalls(FakeModel(dim, answers, errors, handlers), types)


class _FakeCalls(Calls):
    def __init__(self, model: FakeModel, types: Mapping[str, ModelType]) -> None:
        self.made: list[Call] = []
        self.faults: deque[MillstreamError] = deque()
        self._model = model
        self._types = types
        # Error messages name it; it never connects.
        self.connection = Connection("redis://fake")
        self.registry = Registry(self.connection)
        self._detached_streams: dict[str, Streams] = {}
        self.channel = cast(Channel, FakeChannel(model, self.faults, self.streams))
        self.services = cast(Services, FakeServices(types))
        self._cache_reader = CacheReader(self.connection, self.registry)
        self._shadows = Shadows(ShadowCounts(self.connection, self.registry))
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="millstream-fake")

    def begin(
        self,
        chosen: Chosen,
        inputs: Sequence[Json],
        opts: CallOptions,
        hits: Mapping[int, Cached] = NO_HITS,
        began: float | None = None,
        progress: Progress | None = None,
        growing: GrowingText | None = None,
    ) -> Handle:
        handle = super().begin(chosen, inputs, opts, hits, began, progress, growing)
        self.made.append(Call(chosen.spec.name, list(inputs), opts))
        return handle

    def check_options(self, spec: ServiceSpec, options: Mapping[str, Json]) -> int:
        if spec.name in self._types:
            return super().check_options(spec, options)
        read_embed_options(options)
        return 0

    def check_webhook(self, spec: ServiceSpec, url: str) -> None:
        # No config.yaml says what is allowed, and nothing is sent.
        read_webhook(url)

    def check_detached(
        self,
        spec: ServiceSpec,
        inputs: Sequence[Json],
        opts: CallOptions,
        deadline: float | None,
        idempotency_key: str | None,
    ) -> DetachedRequest:
        request = super().check_detached(spec, inputs, opts, deadline, idempotency_key)
        self.made.append(Call(spec.name, list(inputs), opts, True, idempotency_key))
        if self.faults:
            raise self.faults.popleft()
        return request

    def stats(self, service: str) -> ServiceStats:
        """Returns the totals of this fake: each job is a batch of its own."""
        failed = dict(self._model.answered.get(service, {}))
        batches, ok = failed.pop("jobs", 0), failed.pop("ok", 0)
        sizes = dict.fromkeys(PRIORITIES, 0)
        return ServiceStats(batches, ok + sum(failed.values()), sizes, {}, ok, failed, cached=0)

    def streams(self, service: str, within_s: float | None = None) -> Streams:
        return self._detached_streams.setdefault(service, cast(Streams, FakeStreams(self._model, service)))
