"""Calls: the code that the blocking and the async client share, from a call's arguments to its jobs in flight."""

from __future__ import annotations

import atexit
import copy
import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.thread import ThreadPoolExecutor
from types import MappingProxyType
from typing import cast

from millstream.broker.config.load import ServiceSpec
from millstream.broker.contract.errors import InvalidRequest, described
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import BY_OP
from millstream.broker.contract.partial import Delta
from millstream.broker.queue.cache import Cached, CacheKey
from millstream.broker.queue.metrics import Metrics
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.routes import Routes
from millstream.broker.queue.streams import Streams
from millstream.broker.target import find_target
from millstream.broker.transport.connection import Connection, translated
from millstream.client.attempt import Attempt, Fallback, prepare_attempt
from millstream.client.cache_reader import CacheReader
from millstream.client.call_options import CallOptions, check_webhook, find_operation
from millstream.client.call_request import StreamRequest
from millstream.client.call_spans import begin_span, follow
from millstream.client.channel.channel import Channel
from millstream.client.channel.coalescing import Coalescer
from millstream.client.detached import Detached
from millstream.client.detached_request import DetachedRequest, name_call
from millstream.client.growing_text import GrowingText
from millstream.client.handle import Handle
from millstream.client.job_terms import Progress
from millstream.client.known import Known, KnownRoute
from millstream.client.rows import encode_rows, measure_rows
from millstream.client.services import Services, operation_of
from millstream.client.shadow_counts import ShadowCounts
from millstream.client.shadows import TIMEOUT_S, ShadowCall, Shadows
from millstream.client.stats import ServiceStats
from millstream.client.streaming import TextCall, TextStream
from millstream.client.transfer import Transfer
from millstream.client.version_choice import Chosen
from millstream.telemetry.traces import Tracing
from millstream.telemetry.traces import check as check_traces

log = logging.getLogger(__name__)

NO_HITS: Mapping[int, Cached] = MappingProxyType({})

PARTIAL_S = 0.5
"""Seconds that a stream with a gap waits at most for the text so far; then it waits for its job's reply."""


class Calls:
    """All calls of one client to one server. Survives os.fork: the child gets its own client id and threads."""

    tracing = Tracing("off")

    def __init__(self, url: str | None, prefix: str | None) -> None:
        target = find_target(url, prefix, os.environ)
        check_traces(target.telemetry.traces)
        self.tracing = Tracing(target.telemetry.traces)
        self.connection = Connection(target.url, name="millstream-client")
        self.registry = Registry(self.connection, target.prefix)
        self.channel = Channel(self.connection, self.registry)
        self._coalescer = Coalescer(self.channel)
        self.services = Services(self.connection, self.registry)
        self._routes = Routes(self.connection, target.prefix)
        self._metrics = Metrics(self.connection, target.prefix)
        self._cache_reader = CacheReader(self.connection, self.registry)
        self._shadows = Shadows(ShadowCounts(self.connection, self.registry))
        self._partials: dict[str, Streams] = {}
        _living.add(self)
        self.executor = _make_executor()
        # Not at exit: waiting daemon threads then end with the process, without errors.
        weakref.finalize(self, _close, self.channel, self.services).atexit = False

    def start(
        self, service: str | None, inputs: Sequence[Json], opts: CallOptions, progress: Progress | None = None
    ) -> Handle:
        """Sends `inputs`, one row each, and returns at once. `service` None means the only one that runs `opts.op`.

        Raises InvalidRequest, UnknownService, BrokerUnavailable.
        """
        opts = opts.validate()
        # The timeout starts here, because reading the service can wait for the server.
        began = time.monotonic()
        chosen = self._choose(service, opts, began, progress)
        hits = self.read_cache(chosen.spec, inputs, opts) if chosen.spec.runtime.enable_cache else {}
        return self.begin(chosen, inputs, opts, hits, began, progress)

    def start_stream(self, request: StreamRequest) -> TextStream:
        """Does as Client.stream."""
        opts = request.opts.validate()
        began = time.monotonic()
        call = self.begin_stream(self._choose(request.service, opts, began), request.row, opts, began)
        return TextStream(call, self.read_partial)

    def _choose(self, service: str | None, opts: CallOptions, began: float, progress: Progress | None = None) -> Chosen:
        until = opts.until(began)
        name = service or self.services.only(BY_OP[opts.op].type, until)
        return self.choose(self.services.read_target(name, until), opts, progress)

    def choose(self, target: Known | KnownRoute, opts: CallOptions, progress: Progress | None = None) -> Chosen:
        """Returns the service that gets a call to `target`. Does not block. Raises InvalidRequest, UnknownService.

        The calls of one map, which share a `progress`, go to one version: their results were given out before the next
        call begins, so they could not be taken back.
        """
        caller = opts.caller
        if progress is None:
            return self.services.choose(target, caller)
        chosen = self.services.choose(target, caller._replace(version=progress.version or caller.version))
        progress.version = chosen.version
        return chosen._replace(fallback=None, shadow=None)

    def begin_stream(self, chosen: Chosen, payload: object, opts: CallOptions, began: float) -> TextCall:
        """Sends one job whose text can be read while it grows, and does not block. `opts` are checked.

        Raises InvalidRequest if the service does not stream, or `payload` is not JSON.
        """
        spec = chosen.spec
        if not spec.model.operation.streams:
            raise InvalidRequest(
                f"service {spec.name!r} is of type {spec.model.type!r}, which does not stream",
                hint="`call` returns its result",
            )
        growing = GrowingText()
        return TextCall(self.begin(chosen, [cast(Json, payload)], opts, began=began, growing=growing), growing)

    def read_partial(self, call: TextCall) -> Delta:
        """Returns the text so far of a running job, as the server has it, behind what was read before.

        Waits for at most PARTIAL_S. Returns no text if there is none or the server does not answer: the job's reply has
        the whole text.
        """
        service = call.handle.service
        try:
            streams = self._partials.get(service)
            if streams is None:
                streams = self._partials[service] = self.streams(service, PARTIAL_S)
            return call.so_far.read(streams)
        except Exception as error:  # noqa: BLE001 - whatever it is, the stream goes on with the reply
            log.warning("job %s: its text so far cannot be read: %s", call.handle.id, described(error))
            return Delta(0, "")

    def read_cache(self, spec: ServiceSpec, inputs: Sequence[Json], opts: CallOptions) -> Mapping[int, Cached]:
        """Returns the cached answers of `inputs`, by row; no answers if the server is too slow.

        Waits for the server: at most LOOK_UP_S for each CHUNK of rows.
        """
        cache_key, texts = self._find_cacheable_rows(spec, inputs)
        return self._cache_reader.read(spec.name, cache_key, texts, opts.options) if cache_key and texts else {}

    def read_cache_soon(
        self,
        spec: ServiceSpec,
        inputs: Sequence[Json],
        opts: CallOptions,
        deliver: Callable[[Mapping[int, Cached]], object],
    ) -> None:
        """Does as `read_cache`, but returns at once: `deliver` gets the answers, from another thread."""
        cache_key, texts = self._find_cacheable_rows(spec, inputs)
        if cache_key and texts:
            self._cache_reader.read_soon(spec.name, cache_key, texts, opts.options, deliver)
        else:
            deliver({})

    def _find_cacheable_rows(self, spec: ServiceSpec, inputs: Sequence[Json]) -> tuple[CacheKey | None, dict[int, str]]:
        """Returns the cache key and the texts, by row, of rows to look up; no key while the weights are unknown."""
        fingerprint = self.services.fingerprint(spec.name)
        sizes, _ = measure_rows(inputs)
        cache_key = CacheKey.of(spec, fingerprint, operation_of(spec).op) if fingerprint else None
        return cache_key, {row: str(inputs[row]) for row in sizes}

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
        """Does as `start`, with checked `opts`, the chosen service and the cached answers `hits`. Does not block.

        The call's timeout counts from `began`, monotonic seconds; None is now. `growing` gets the text of a streaming
        call.
        """
        operation = find_operation(chosen.spec, opts.op)
        inputs = encode_rows(operation, inputs)
        # A deep copy: the caller may change a list in the options.
        opts = opts._replace(options=copy.deepcopy(opts.options)) if opts.options else opts
        attempt = self._attempt(chosen, inputs, opts, hits)
        span = begin_span(self.tracing, chosen.spec, operation, inputs, opts.priority, self.channel.client_id)
        trace = span.traceparent if span else ""
        fallback = self._fall_back(chosen.fallback, opts, trace) if chosen.fallback else None
        terms = attempt.terms._replace(trace=trace) if span else attempt.terms
        transfer = Transfer(
            attempt.channel,
            self.services,
            terms,
            inputs,
            attempt.parts,
            attempt.given,
            began,
            progress,
            growing,
            fallback,
        )
        if span:
            follow(span, transfer)
        if chosen.shadow:
            self._shadows.follow(ShadowCall(chosen.shadow, inputs, opts, transfer, self._send_shadow))
        return Handle(transfer, owner=self)

    def _send_shadow(self, call: ShadowCall) -> Handle:
        """Sends a copy of a call, which costs no caller's limit anything, and does not wait for room."""
        opts = call.opts._replace(priority="batch", timeout=TIMEOUT_S, wait=False, tenant="")
        # Not through the coalescer: a caller whose job is the same would wait at priority batch.
        attempt = self._attempt(call.chosen, call.inputs, opts, NO_HITS)._replace(channel=self.channel)
        terms = attempt.terms._replace(charged=False)
        transfer = Transfer(self.channel, self.services, terms, call.inputs, attempt.parts, attempt.given)
        return Handle(transfer, owner=self)

    def _fall_back(self, chosen: Chosen, opts: CallOptions, trace: str) -> Fallback:
        def begin_again(inputs: Sequence[Json]) -> Attempt:
            attempt = self._attempt(chosen, inputs, opts, NO_HITS)
            return attempt._replace(terms=attempt.terms._replace(trace=trace))

        return begin_again

    def _attempt(
        self, chosen: Chosen, inputs: Sequence[Json], opts: CallOptions, hits: Mapping[int, Cached]
    ) -> Attempt:
        spec = chosen.spec
        # If a service caches its answers, equal jobs in flight share theirs, too.
        channel = self._coalescer if spec.runtime.enable_cache else self.channel
        return prepare_attempt(channel, chosen, inputs, opts, hits, self.check_options(spec, opts.options))

    def check_options(self, spec: ServiceSpec, options: Mapping[str, Json]) -> int:
        """Returns the UTF-8 bytes that the model of `spec` reads beside each row.

        Raises InvalidRequest if the model would refuse `options` for every row.
        """
        return spec.model.operation.check(options)

    def check_webhook(self, spec: ServiceSpec, url: str) -> None:
        """Raises InvalidRequest if a call of `spec` may not have this webhook."""
        check_webhook(spec, url)

    def submit_detached(
        self, service: str, inputs: Sequence[Json], opts: CallOptions, idempotency_key: str | None
    ) -> Detached:
        """Does as Client.submit_detached, with `opts`."""
        opts = opts.validate()
        until = opts.until(time.monotonic())
        target = self.services.read_target(service, until)
        return self.submit_to(self.choose_detached(target, opts, idempotency_key), inputs, opts, until, idempotency_key)

    def submit_to(
        self,
        spec: ServiceSpec,
        inputs: Sequence[Json],
        opts: CallOptions,
        until: float | None,
        idempotency_key: str | None,
    ) -> Detached:
        """Does as Client.submit_detached, for this service whether it has a route or not, with checked `opts`."""
        request = self.check_detached(spec, inputs, opts, until, idempotency_key)
        try:
            return request.begin(self, request.per_job).wait()
        except InvalidRequest:
            # This payload may have been submitted with this key before the service's batch size was changed.
            per_job = request.find_other_per_job(self)
            if per_job is None:
                raise
            return request.begin(self, per_job).wait()

    def choose_detached(self, target: Known | KnownRoute, opts: CallOptions, key: str | None) -> ServiceSpec:
        """Returns the service that gets a detached call. Waits for the server if the call has an idempotency key.

        A call with a key goes to the version that it went to first: a change of weights must not run it twice. Raises
        InvalidRequest, UnknownService, BrokerUnavailable.
        """
        chosen, caller = self.services.choose(target, opts.caller), opts.caller
        if key is None or isinstance(target, Known):
            return chosen.spec
        name = target.route.name
        first = self._routes.pin(name, name_call(name, opts.tenant, key), chosen.version)
        if first != chosen.version and caller.version:
            raise InvalidRequest(
                f"this idempotency key was used for version {first!r}", hint="use another key for another version"
            )
        return self.services.choose(target, caller._replace(version=first)).spec

    def check_detached(
        self,
        spec: ServiceSpec,
        inputs: Sequence[Json],
        opts: CallOptions,
        deadline: float | None,
        idempotency_key: str | None,
    ) -> DetachedRequest:
        """Returns a checked detached call that can be submitted. Raises InvalidRequest."""
        operation = find_operation(spec, opts.op)
        beside = self.check_options(spec, opts.options)
        if opts.webhook is not None:
            self.check_webhook(spec, opts.webhook)
        return DetachedRequest.of(spec, operation, inputs, beside, opts, deadline, idempotency_key)

    def stats(self, service: str) -> ServiceStats:
        """Does as Client.stats."""
        self.services.read(service)
        with translated(self.connection.safe_url):
            return ServiceStats.of(self._metrics.read(service), self.streams(service).sizes())

    def streams(self, service: str, within_s: float | None = None) -> Streams:
        """Returns the job streams of `service`, for commands that do not use the channel.

        The commands fail after `within_s` seconds without a byte from the server.
        """
        client = self.connection.client if within_s is None else self.connection.within(within_s)
        return Streams(client, self.registry.keys(service))

    def close(self) -> None:
        """Ends threads and connections. Calls that other threads wait for get BrokerUnavailable."""
        self.channel.flush(FLUSH_S)
        self._cache_reader.close()
        self._shadows.close()
        _close(self.channel, self.services)

    def flush(self, timeout: float) -> None:
        """Sends what no caller waits for: cancellations, for at most `timeout` seconds, and counted cache hits."""
        self.channel.flush(timeout)
        self._cache_reader.flush()

    def after_fork(self) -> None:
        """Gives a forked child its own connections, threads and client id."""
        self.connection.after_fork()
        self.channel.after_fork()
        self._coalescer.after_fork()
        self.services.after_fork()
        self.executor = _make_executor()
        self._cache_reader.after_fork()
        self._shadows.after_fork()
        self._partials = {}


_living: weakref.WeakSet[Calls] = weakref.WeakSet()


EXECUTOR_THREADS = 8
"""Threads of the async client, for the few blocking calls that have no asynchronous form."""

FLUSH_S = 1.0
"""Seconds that a client which is being closed, or its process at exit, waits at most to send its last cancellations."""


def _close(channel: Channel, services: Services) -> None:
    services.close()
    channel.close()


def _make_executor() -> ThreadPoolExecutor:
    # Not asyncio's default executor: other libraries use its few threads, too.
    return ThreadPoolExecutor(EXECUTOR_THREADS, thread_name_prefix="millstream-async")


def _renew_after_fork() -> None:
    for calls in list(_living):
        calls.after_fork()


def _flush() -> None:
    """Sends the last cancellations at exit, so that workers do not run cancelled jobs."""
    until = time.monotonic() + FLUSH_S
    for calls in list(_living):
        calls.flush(max(0.0, until - time.monotonic()))


atexit.register(_flush)


os.register_at_fork(after_in_child=_renew_after_fork)
