"""Calls: the code that the blocking and the async client share, from a call's arguments to its jobs in flight."""

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
from millstream.broker.contract.embedding import Truncate
from millstream.broker.contract.errors import InputTooLong, InvalidRequest, MillstreamError
from millstream.broker.contract.job import Json, Priority
from millstream.broker.contract.operations import BY_OP, Operation
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
from millstream.client.result import Embeddings
from millstream.client.services import Services, operation_of
from millstream.client.split import Part, estimate_tokens, split, split_evenly, split_once

MAX_ROW_BYTES = 512 * 1024
"""Bytes that one row may have at most, with those that the model reads beside it."""

NO_HITS: Mapping[int, Cached] = MappingProxyType({})
_TEXTS, _LISTS = (str, bytes), (list, Sequence, np.ndarray)
_TENANT = re.compile(r"[A-Za-z0-9_.-]{0,64}")

PriorityName = Literal["realtime", "normal", "batch"]
_TRUNCATES: tuple[str, ...] = get_args(Truncate)
_PRIORITIES: Mapping[str, Priority] = {str(each): each for each in Priority}


class CallOptions(NamedTuple):
    """Options of a call. `timeout` is in seconds, for the whole call; `options` go to the model.

    `op` is the operation that the service must run; if it is empty, the service's own operation runs.
    """

    priority: PriorityName = "normal"
    timeout: float | None = None
    wait: bool = True
    tenant: str = ""
    options: Mapping[str, Json] = MappingProxyType({})
    op: str = ""

    def until(self, began: float) -> float | None:
        """Returns when the timeout of a call that began at `began` is over; both in monotonic seconds."""
        return None if self.timeout is None else began + self.timeout

    def checked(self) -> CallOptions:
        """Returns a valid copy, with Python values instead of NumPy's. Raises InvalidRequest if a value is wrong."""
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
            raise InvalidRequest(f"tenant={self.tenant!r} is not valid", hint="at most 64 of A-Z a-z 0-9 _ . -")
        if self.options:
            self._check_options()

    def _check_options(self) -> None:
        truncate = self.options.get("truncate", "none")
        if truncate not in _TRUNCATES:
            raise InvalidRequest(f"truncate={truncate!r} is not valid", hint=f"one of {', '.join(_TRUNCATES)}")
        try:
            encode_inputs([], self.options)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"options must be JSON values: {error}") from error


_PLAIN_TYPES = frozenset({str, int, float, bool, type(None)})


def _is_plain(opts: CallOptions) -> bool:
    """Returns whether no value needs to be converted. A fast check, since every call runs it."""
    if opts.options and not _PLAIN_TYPES.issuperset(map(type, opts.options.values())):
        return False
    return type(opts.timeout) in _PLAIN_TYPES and type(opts.wait) in _PLAIN_TYPES and type(opts.tenant) in _PLAIN_TYPES


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Calls:
    """All calls of one client to one server. Survives os.fork: the child gets its own client id and threads."""

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
        # Not at exit: waiting daemon threads then end with the process, without errors.
        weakref.finalize(self, _close, self.channel, self.services).atexit = False

    def start(
        self, service: str | None, inputs: Sequence[Json], opts: CallOptions, progress: Progress | None = None
    ) -> Handle:
        """Sends `inputs`, one row each, and returns at once. `service` None means the only one that runs `opts.op`.

        Raises InvalidRequest, UnknownService, BrokerUnavailable.
        """
        opts = opts.checked()
        # The timeout starts here, because reading the service can wait for the server.
        began = time.monotonic()
        until = opts.until(began)
        spec = self.services.read(service or self.services.only(BY_OP[opts.op].type, until), until)
        hits = self.read_cache(spec, inputs, opts) if spec.runtime.enable_cache else {}
        return self.begin(spec, inputs, opts, hits, began, progress)

    def read_cache(self, spec: ServiceSpec, inputs: Sequence[Json], opts: CallOptions) -> Mapping[int, Cached]:
        """Returns the cached answers of `inputs`, by row; no answers if the server is too slow.

        Waits for the server: at most LOOK_UP_S for each CHUNK of rows.
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
        """Does as `read_cache`, but returns at once: `deliver` gets the answers, from another thread."""
        cache_key, texts = self._cacheable_rows(spec, inputs)
        if cache_key and texts:
            self._cache_reader.read_soon(spec.name, cache_key, texts, opts.options, deliver)
        else:
            deliver({})

    def _cacheable_rows(self, spec: ServiceSpec, inputs: Sequence[Json]) -> tuple[CacheKey | None, dict[int, str]]:
        """Returns the cache key and the texts, by row, of rows to look up; no key while the weights are unknown."""
        fingerprint = self.services.fingerprint(spec.name)
        sizes, _ = row_sizes(inputs)
        cache_key = CacheKey.of(spec, fingerprint, operation_of(spec).op) if fingerprint else None
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
        """Does as `start`, with checked `opts`, the service's spec and the cached answers `hits`. Does not block.

        The call's timeout counts from `began`, monotonic seconds; None is now.
        """
        operation = find_operation(spec, opts.op)
        beside = self.check_options(spec, opts.options)
        inputs = outgoing(operation, inputs)
        parts, refused = cut(spec, inputs, hits, beside)
        limits = spec.runtime.limits(opts.priority)
        terms = JobTerms(
            service=spec.name,
            op=operation.op,
            priority=_PRIORITIES[opts.priority],
            # A deep copy: the caller may change a list in the options.
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
        # If a service caches its answers, equal jobs in flight share theirs, too.
        channel = self._coalescer if spec.runtime.enable_cache else self.channel
        given: dict[int, MillstreamError | Cached] = {**refused, **hits} if refused or hits else {}
        return Handle(channel, terms, inputs, parts, given, self.services, began, progress, self)

    def check_options(self, spec: ServiceSpec, options: Mapping[str, Json]) -> int:
        """Returns the UTF-8 bytes that the model of `spec` reads beside each row.

        Raises InvalidRequest if the model would refuse `options` for every row.
        """
        return spec.model.operation.check(options)

    def submit_detached(
        self, service: str, inputs: Sequence[Json], opts: CallOptions, idempotency_key: str | None
    ) -> Detached:
        """Does as Client.submit_detached, with `opts`."""
        return Detached.submit(self, service, inputs, opts, idempotency_key)

    def detached_request(
        self,
        spec: ServiceSpec,
        inputs: Sequence[Json],
        opts: CallOptions,
        deadline: float | None,
        idempotency_key: str | None,
    ) -> DetachedRequest:
        """Returns a checked detached call that can be submitted. Raises InvalidRequest."""
        return DetachedRequest.of(self, spec, inputs, opts, deadline, idempotency_key)

    def streams(self, service: str, within_s: float | None = None) -> Streams:
        """Returns the job streams of `service`, for commands that do not use the channel.

        The commands fail after `within_s` seconds without a byte from the server.
        """
        client = self.connection.client if within_s is None else self.connection.within(within_s)
        return Streams(client, self.registry.keys(service))

    def close(self) -> None:
        """Ends threads and connections. Calls that other threads wait for get BrokerUnavailable."""
        self.channel.flush(FLUSH_S)
        _close(self.channel, self.services)

    def after_fork(self) -> None:
        """Gives a forked child its own connections, threads and client id."""
        self.connection.after_fork()
        self.channel.after_fork()
        self._coalescer.after_fork()
        self.services.after_fork()
        self.executor = _executor()
        self._cache_reader.after_fork()


def frozen(inputs: Sequence[Json], opts: CallOptions) -> tuple[Sequence[Json], CallOptions]:
    """Returns copies of a caller's inputs and options, which it may change while its call waits for the server.

    Inputs that are not a list are returned as they are.
    """
    if not _is_list(inputs):
        return inputs, opts
    rows = [row if isinstance(row, str) else _copied(row) for row in inputs]
    return rows, opts._replace(options=copy.deepcopy(dict(opts.options))) if opts.options else opts


def _copied(row: Json) -> Json:
    try:
        return copy.deepcopy(row)
    except Exception:  # noqa: BLE001 - a row that cannot be copied is not JSON, and becomes its row's error
        return row


def find_operation(spec: ServiceSpec, op: str) -> Operation:
    """Returns the operation of a call's jobs. `op` is the one that the call asks for; empty for any.

    Raises InvalidRequest if the service cannot run it.
    """
    operation = operation_of(spec)
    if op and op != operation.op:
        # A user's own code may answer vectors, so `embed` may call it.
        may_answer = operation.results == "any" and BY_OP[op].results == "vectors"
        if not may_answer:
            raise InvalidRequest(f"service {spec.name!r} is of type {spec.model.type!r}", hint=f"it cannot {op}")
    return operation


def cut(
    spec: ServiceSpec, inputs: Sequence[object], hits: Container[int] = (), beside: int = 0
) -> tuple[list[Part], dict[int, MillstreamError]]:
    """Splits a call into jobs, without the rows of `hits`. Returns the parts, and the errors of rows that are not sent.

    A bad row does not affect other rows. If the service has a cache, equal texts are sent once. `beside` is as in
    row_sizes.
    """
    sizes, refused = row_sizes(inputs, beside)
    operation = spec.model.operation
    rows, most_tokens = min(spec.runtime.batch_size, MAX_ROWS), spec.runtime.batch_tokens
    if operation.streams:
        rows = 1
    if operation.even_cost:
        return split_evenly(sizes, rows, spec.runtime.row_tokens), refused
    if not spec.runtime.enable_cache:
        return split(sizes, rows, most_tokens), refused
    misses = {row: size for row, size in sizes.items() if row not in hits}
    return split_once(misses, inputs, rows, most_tokens), refused


def tokens_of(spec: ServiceSpec, sizes: Sequence[int]) -> int:
    """Estimates how many tokens rows of these sizes, UTF-8 bytes, have for the model of `spec`."""
    if spec.model.operation.even_cost:
        return spec.runtime.row_tokens * len(sizes)
    return sum(map(estimate_tokens, sizes))


def outgoing(operation: Operation, inputs: Sequence[Json]) -> Sequence[Json]:
    """Returns the rows to send. Payloads are encoded as JSON now, so the caller may change them later.

    A payload that is not JSON becomes its row's error. Raises InvalidRequest if `inputs` are payloads, but not a list.
    """
    if operation.row == "text":
        return inputs
    if not _is_list(inputs):
        raise InvalidRequest(
            f"a list of payloads is needed, not {type(inputs).__name__}", hint="`call` takes a single one"
        )
    return cast(Sequence[Json], [_as_json(payload) for payload in inputs])


def _is_list(inputs: object) -> bool:
    """Returns whether `inputs` has rows. An array without a dimension has none."""
    return isinstance(inputs, _LISTS) and not isinstance(inputs, _TEXTS) and getattr(inputs, "ndim", 1) > 0


def _as_json(payload: object) -> JsonText | InvalidRequest:
    try:
        return encode_value(payload)
    except (TypeError, ValueError) as error:
        return InvalidRequest(f"not a JSON value: {error}"[:500], hint="convert it first")


def row_sizes(inputs: Sequence[object], beside: int = 0) -> tuple[dict[int, int], dict[int, MillstreamError]]:
    """Returns the size in UTF-8 bytes of each good row, and the error of each bad row.

    `beside` is the number of bytes that the model reads with each row, such as a reranker's query. Raises
    InvalidRequest if `inputs` is not a list.
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
    """Returns a call's result as `embed` does: [rows, dim], [0, 0] for no rows, [dim] for a single text.

    Raises InvalidRequest if the model answers other values than dense vectors.
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
    """Returns the size in UTF-8 bytes of a text or an encoded row, plus `beside`; an error if it cannot be sent."""
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
    """Returns how many jobs one call keeps in flight at most: never more than a quarter of the queue."""
    return max(1, min(spec.runtime.max_queue_size // 4, MAX_JOBS_PER_CALL))


_living: weakref.WeakSet[Calls] = weakref.WeakSet()


EXECUTOR_THREADS = 8
"""Threads of the async client, for the few blocking calls that have no asynchronous form."""

FLUSH_S = 1.0
"""Seconds that a client which is being closed, or its process at exit, waits at most to send its last cancellations."""


def _close(channel: Channel, services: Services) -> None:
    services.close()
    channel.close()


def _executor() -> ThreadPoolExecutor:
    # Not asyncio's default executor: other libraries use its few threads, too.
    return ThreadPoolExecutor(EXECUTOR_THREADS, thread_name_prefix="millstream-async")


def _forked() -> None:
    for calls in list(_living):
        calls.after_fork()


def _flush() -> None:
    """Sends the last cancellations at exit, so that workers do not run cancelled jobs."""
    until = time.monotonic() + FLUSH_S
    for calls in list(_living):
        calls.channel.flush(max(0.0, until - time.monotonic()))


atexit.register(_flush)


os.register_at_fork(after_in_child=_forked)
