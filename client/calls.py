"""From a call's arguments to jobs under way: what the blocking and the async client share."""

from __future__ import annotations

import atexit
import copy
import os
import re
import time
import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures.thread import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np

from millstream.broker.config.load import ServiceSpec
from millstream.broker.contract.codec import MAX_ROWS, JsonText, encode_inputs, encode_value
from millstream.broker.contract.embedding import EmbedOptions, Truncate
from millstream.broker.contract.errors import InputTooLong, InvalidRequest, MillstreamError
from millstream.broker.contract.job import Json, Priority
from millstream.broker.contract.scalars import plain
from millstream.broker.queue.cache import Cached, CacheKey
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.streams import MAX_JOBS_PER_CALL, Streams
from millstream.broker.target import find_target
from millstream.broker.transport.connection import Connection
from millstream.client.cache_reader import CacheReader
from millstream.client.channel.channel import Channel
from millstream.client.channel.coalescing import Coalescer
from millstream.client.detached import Detached, DetachedRequest
from millstream.client.handle import Handle
from millstream.client.job_terms import JobTerms, Progress
from millstream.client.rerank import check_question
from millstream.client.result import Embeddings
from millstream.client.services import Services, op_of
from millstream.client.split import Part, estimate_tokens, split, split_evenly, split_once

MAX_ROW_BYTES = 512 * 1024
NO_HITS: Mapping[int, Cached] = MappingProxyType({})
_TEXTS, _LISTS = (str, bytes), (list, Sequence, np.ndarray)
_TENANT = re.compile(r"[A-Za-z0-9_.-]{0,64}")

PriorityName = Literal["realtime", "normal", "batch"]
_TRUNCATES: tuple[str, ...] = get_args(Truncate)
MODEL_TYPES: Mapping[str, str] = {"embed": "embedding", "rerank": "reranker"}
"""Operation -> the type of model whose only service runs it."""
_PRIORITIES: Mapping[str, Priority] = {str(each): each for each in Priority}


class CallOptions(NamedTuple):
    """What a caller may say about a call. `timeout` in seconds, for all of it; `options` go to the model.

    `op` is the operation that the service must run; an empty one is whatever it does.
    """

    priority: PriorityName = "normal"
    timeout: float | None = None
    wait: bool = True
    tenant: str = ""
    options: Mapping[str, Json] = MappingProxyType({})
    op: str = ""

    def until(self, began: float) -> float | None:
        """When the time of a call is over that began at `began`, monotonic seconds."""
        return None if self.timeout is None else began + self.timeout

    def checked(self) -> CallOptions:
        """The same, with Python's own values in the place of NumPy's. Raises InvalidRequest."""
        opts = self if _is_plain(self) else self._plain()
        opts._check()
        return opts

    def _plain(self) -> CallOptions:
        given = [plain(value) for value in self]
        options = {name: cast(Json, plain(value)) for name, value in self.options.items()}
        return CallOptions(*cast(tuple[Any, ...], given))._replace(options=options)

    def _check(self) -> None:
        if not isinstance(self.priority, str) or self.priority not in _PRIORITIES:
            raise InvalidRequest(f"no priority {self.priority!r}", hint=f"one of {', '.join(Priority)}")
        if self.timeout is not None and not (_is_number(self.timeout) and self.timeout > 0):
            raise InvalidRequest(f"timeout={self.timeout!r} is not a number of seconds above 0")
        if not (isinstance(self.tenant, str) and _TENANT.fullmatch(self.tenant)):
            raise InvalidRequest(f"tenant={self.tenant!r}", hint="at most 64 of A-Z a-z 0-9 _ . -")
        if self.options:
            self._check_options()

    def _check_options(self) -> None:
        truncate = self.options.get("truncate", "none")
        if truncate not in _TRUNCATES:
            raise InvalidRequest(f"truncate={truncate!r}", hint=f"one of {', '.join(_TRUNCATES)}")
        try:
            encode_inputs([], self.options)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"options that JSON cannot carry: {error}") from error


_PLAIN_TYPES = frozenset({str, int, float, bool, type(None)})


def _is_plain(opts: CallOptions) -> bool:
    """Whether nothing needs to be converted; asked at each call."""
    if opts.options and not _PLAIN_TYPES.issuperset(map(type, opts.options.values())):
        return False
    return type(opts.timeout) in _PLAIN_TYPES and type(opts.wait) in _PLAIN_TYPES and type(opts.tenant) in _PLAIN_TYPES


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Calls:
    """One process's calls to one server. Survives os.fork: the child gets an identity and threads of its own."""

    def __init__(self, url: str | None, prefix: str | None) -> None:
        target = find_target(url, prefix, os.environ)
        self.connection = Connection(target.url, name="millstream-client")
        self.registry = Registry(self.connection, target.prefix)
        self.channel = Channel(self.connection, self.registry)
        self._coalescer = Coalescer(self.channel)
        self.services = Services(self.connection, self.registry)
        self._cache_reader = CacheReader(self.connection, self.registry)
        _living.add(self)
        self.executor = _executor()
        # Not at exit: threads that wait then end with the process, and say nothing.
        weakref.finalize(self, _close, self.channel, self.services).atexit = False

    def start(
        self, service: str | None, inputs: Sequence[Json], opts: CallOptions, progress: Progress | None = None
    ) -> Handle:
        """Send `inputs`, one a row, and return at once. Without a `service` it is the only one that runs `opts.op`.

        Raises InvalidRequest, UnknownService, BrokerUnavailable.
        """
        opts = opts.checked()
        # The clock starts here: reading the service, too, waits for the server.
        began = time.monotonic()
        until = opts.until(began)
        spec = self.services.read(service or self.services.only(MODEL_TYPES[opts.op], until), until)
        hits = self.read_cache(spec, inputs, opts) if spec.runtime.enable_cache else {}
        return self.begin(spec, inputs, opts, hits, began, progress)

    def read_cache(self, spec: ServiceSpec, inputs: Sequence[Json], opts: CallOptions) -> Mapping[int, Cached]:
        """What the cache of a service that was read has for `inputs`, by row; nothing if the server is too slow.

        Waits for the server: LOOK_UP_S at most for each CHUNK of rows.
        """
        cache_key, texts = self._cacheable_rows(spec, inputs)
        return self._cache_reader.read(spec.name, cache_key, texts, opts.options) if cache_key and texts else {}

    def read_cache_soon(
        self,
        spec: ServiceSpec,
        inputs: Sequence[Json],
        opts: CallOptions,
        deliver: Callable[[Mapping[int, Cached]], object],
    ) -> None:
        """Hand what `read_cache` finds to `deliver`, from another thread. Returns at once."""
        cache_key, texts = self._cacheable_rows(spec, inputs)
        if cache_key and texts:
            self._cache_reader.read_soon(spec.name, cache_key, texts, opts.options, deliver)
        else:
            deliver({})

    def _cacheable_rows(self, spec: ServiceSpec, inputs: Sequence[Json]) -> tuple[CacheKey | None, dict[int, str]]:
        """The recipe and texts, by row, of answers that may be kept; no recipe while the weights are unknown."""
        fingerprint = self.services.fingerprint(spec.name)
        sizes, _ = row_sizes(inputs)
        cache_key = CacheKey.of(spec, fingerprint, op_of(spec)) if fingerprint else None
        return cache_key, {row: str(inputs[row]) for row in sizes}

    def begin(
        self,
        spec: ServiceSpec,
        inputs: Sequence[Json],
        opts: CallOptions,
        hits: Mapping[int, Cached] = NO_HITS,
        began: float | None = None,
        progress: Progress | None = None,
    ) -> Handle:
        """As `start`, for a checked `opts`, a service that was read and what `read_cache` found: waits for nothing.

        The call's time counts from `began`, monotonic seconds.
        """
        op, beside = checked(spec, opts)
        self.check_options(spec, opts.options)
        inputs = outgoing(spec, inputs, opts.options)
        parts, refused = cut(spec, inputs, hits, beside)
        limits = spec.runtime.limits(opts.priority)
        terms = JobTerms(
            service=spec.name,
            op=op,
            priority=_PRIORITIES[opts.priority],
            # A copy, too: a caller may change a list among them.
            options=copy.deepcopy(opts.options) if opts.options else opts.options,
            timeout=opts.timeout,
            total_timeout=limits.total_timeout,
            queue_timeout=limits.queue_timeout,
            wait=opts.wait,
            most_jobs=_most_jobs(spec),
            tenant=opts.tenant,
            replicated=spec.replicated,
            rate_per_tenant=bool(opts.tenant) and spec.rate_per_tenant,
            idle_timeout=spec.runtime.total_timeout,
        )
        # Where answers are kept, those of jobs under way are shared, too.
        channel = self._coalescer if spec.runtime.enable_cache else self.channel
        given: dict[int, MillstreamError | Cached] = {**refused, **hits} if refused or hits else {}
        return Handle(channel, terms, inputs, parts, given, self.services, began, progress, self)

    def check_options(self, spec: ServiceSpec, options: Mapping[str, Json]) -> None:
        """Raises InvalidRequest for options that the model of `spec` would refuse for every row."""
        if options and spec.model.type == "embedding":
            EmbedOptions.read(options)

    def submit_detached(
        self, service: str, inputs: Sequence[Json], opts: CallOptions, idempotency_key: str | None
    ) -> Detached:
        """Client.submit_detached."""
        return Detached.submit(self, service, inputs, opts, idempotency_key)

    def detached_request(
        self,
        spec: ServiceSpec,
        inputs: Sequence[Json],
        opts: CallOptions,
        deadline: float | None,
        idempotency_key: str | None,
    ) -> DetachedRequest:
        """A detached call that may be begun. Raises InvalidRequest."""
        return DetachedRequest.of(self, spec, inputs, opts, deadline, idempotency_key)

    def streams(self, service: str, within_s: float | None = None) -> Streams:
        """The job streams of `service`, for calls that go past the channel.

        Their commands fail after `within_s` seconds without a byte from the server.
        """
        client = self.connection.client if within_s is None else self.connection.within(within_s)
        return Streams(client, self.registry.keys(service))

    def close(self) -> None:
        """End threads and connections. Calls under way in other threads get BrokerUnavailable."""
        self.channel.flush(FLUSH_S)
        _close(self.channel, self.services)

    def after_fork(self) -> None:
        """In a forked child: connections, threads and an identity of its own."""
        self.connection.after_fork()
        self.channel.after_fork()
        self._coalescer.after_fork()
        self.services.after_fork()
        self.executor = _executor()
        self._cache_reader.after_fork()


def frozen(inputs: Sequence[Json], opts: CallOptions) -> tuple[Sequence[Json], CallOptions]:
    """Copies of what a caller gave: it may change them while its call waits for the server. What is no list is kept."""
    if not _is_list(inputs):
        return inputs, opts
    rows = [row if isinstance(row, str) else _copied(row) for row in inputs]
    return rows, opts._replace(options=copy.deepcopy(dict(opts.options))) if opts.options else opts


def _copied(row: Json) -> Json:
    try:
        return copy.deepcopy(row)
    except Exception:  # noqa: BLE001 - whatever it is, it is no JSON, and becomes its row's error
        return row


def checked(spec: ServiceSpec, opts: CallOptions) -> tuple[str, int]:
    """The operation of a call's jobs, and the bytes that are read with each row. Raises InvalidRequest."""
    op = op_of(spec)
    # A user's own code may answer vectors.
    if opts.op and opts.op != op and not (opts.op == "embed" and op in ("call", "echo")):
        raise InvalidRequest(f"service {spec.name!r} is of type {spec.model.type!r}", hint=f"it cannot {opts.op}")
    return op, check_question(opts.options) if op == "rerank" else 0


def cut(
    spec: ServiceSpec, inputs: Sequence[object], hits: Container[int] = (), beside: int = 0
) -> tuple[list[Part], dict[int, MillstreamError]]:
    """The jobs a call becomes, without the rows of `hits`, and the rows that never travel.

    A bad row costs its neighbours nothing. Where the service has a cache, a text that comes twice travels once.
    `beside` is as in row_sizes.
    """
    sizes, refused = row_sizes(inputs, beside)
    rows, most_tokens = min(spec.runtime.batch_size, MAX_ROWS), spec.runtime.batch_tokens
    if spec.model.type == "custom":
        return split_evenly(sizes, rows, spec.runtime.row_tokens), refused
    if not spec.runtime.enable_cache:
        return split(sizes, rows, most_tokens), refused
    misses = {row: size for row, size in sizes.items() if row not in hits}
    return split_once(misses, inputs, rows, most_tokens), refused


def tokens_of(spec: ServiceSpec, sizes: Sequence[int]) -> int:
    """About how many tokens rows of these sizes, UTF-8 bytes, have for the model of `spec`."""
    if spec.model.type == "custom":
        return spec.runtime.row_tokens * len(sizes)
    return sum(map(estimate_tokens, sizes))


def outgoing(spec: ServiceSpec, inputs: Sequence[Json], options: Mapping[str, Json]) -> Sequence[Json]:
    """The rows as they travel: of a custom service any JSON, encoded now, so that its caller may change it later.

    What JSON cannot carry becomes its row's error. Raises InvalidRequest if these are no rows, or options are given.
    """
    if spec.model.type != "custom":
        return inputs
    if options:
        raise InvalidRequest(f"service {spec.name!r} takes no options", hint="put them into the payload")
    if not _is_list(inputs):
        raise InvalidRequest(
            f"a list of payloads is needed, not {type(inputs).__name__}", hint="`call` takes a single one"
        )
    return cast(Sequence[Json], [_as_json(payload) for payload in inputs])


def _is_list(inputs: object) -> bool:
    """Whether it has rows: an array without a dimension has none."""
    return isinstance(inputs, _LISTS) and not isinstance(inputs, _TEXTS) and getattr(inputs, "ndim", 1) > 0


def _as_json(payload: object) -> JsonText | InvalidRequest:
    try:
        return encode_value(payload)
    except (TypeError, ValueError) as error:
        return InvalidRequest(f"no JSON value: {error}"[:500], hint="convert it first")


def row_sizes(inputs: Sequence[object], beside: int = 0) -> tuple[dict[int, int], dict[int, MillstreamError]]:
    """Each good row's size in UTF-8 bytes, each bad row's error. Raises InvalidRequest if `inputs` is no list.

    `beside` are bytes that the model reads with each row: a reranker's query.
    """
    if not _is_list(inputs):
        raise InvalidRequest(f"a list of strings is needed, not {type(inputs).__name__}")
    sizes: dict[int, int] = {}
    refused: dict[int, MillstreamError] = {}
    for row, text in enumerate(inputs):
        size = _size(text, beside)
        if isinstance(size, int):
            sizes[row] = size
        else:
            refused[row] = size
    return sizes, refused


def vectors_of(result: Embeddings | list[Json], single: bool) -> Embeddings:
    """A call's result as `embed` returns it: [rows, dim], [0, 0] for no rows, [dim] for a single text.

    Raises InvalidRequest if the model gives no vectors.
    """
    if not isinstance(result, Embeddings):
        if result:
            raise InvalidRequest(
                "this service answers values, not dense vectors",
                hint="client.submit(SERVICE, texts).result() is a list of them",
            )
        return Embeddings.of(np.zeros((0, 0), dtype=np.float32), 0, (), {})
    return Embeddings.of(result[0], result.usage["tokens"], result.truncated, result.timings) if single else result


def _size(text: object, beside: int) -> int | MillstreamError:
    """The size in UTF-8 bytes of a text, or of a row that is JSON already, with those `beside` it; or why it cannot
    travel.
    """
    if not isinstance(text, str):
        if isinstance(text, MillstreamError):
            return text
        return InvalidRequest(f"not a string but {type(text).__name__}", hint="convert it first")
    try:
        size = len(text.encode()) + beside
    except UnicodeEncodeError as error:
        return InvalidRequest(f"not valid Unicode: {error.reason} at character {error.start}")
    if size > MAX_ROW_BYTES:
        return InputTooLong(f"{size} bytes, at most {MAX_ROW_BYTES} travel in one row", hint="shorten it")
    return size


def _most_jobs(spec: ServiceSpec) -> int:
    """Jobs one call keeps in flight at most: never most of the queue."""
    return max(1, min(spec.runtime.max_queue_size // 4, MAX_JOBS_PER_CALL))


_living: weakref.WeakSet[Calls] = weakref.WeakSet()


EXECUTOR_THREADS = 8
"""Of the async client: for the few things that wait for the server and have no answer to listen for."""

FLUSH_S = 1.0
"""Seconds the end of a client, or of its process, waits at most until its last cancellations are sent."""


def _close(channel: Channel, services: Services) -> None:
    services.close()
    channel.close()


def _executor() -> ThreadPoolExecutor:
    # Not asyncio's default one: its few threads are everybody's.
    return ThreadPoolExecutor(EXECUTOR_THREADS, thread_name_prefix="millstream-async")


def _forked() -> None:
    for calls in list(_living):
        calls.after_fork()


def _flush() -> None:
    """At exit: jobs that were cancelled a moment ago must not run for nobody."""
    until = time.monotonic() + FLUSH_S
    for calls in list(_living):
        calls.channel.flush(max(0.0, until - time.monotonic()))


atexit.register(_flush)


os.register_at_fork(after_in_child=_forked)
