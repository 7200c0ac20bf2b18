"""From a call's arguments to jobs under way: what the blocking and the async client share."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple, cast, get_args

import numpy as np

from millstream.broker.admission import resume_hint
from millstream.broker.cache import Cached, Recipe
from millstream.broker.codec import MAX_ROWS, JsonText, encode_inputs, encode_value
from millstream.broker.config import ServiceSpec
from millstream.broker.connection import Connection
from millstream.broker.embedding import EmbedOptions, Truncate
from millstream.broker.errors import DeadlineExceeded, InputTooLong, InvalidRequest, MillstreamError, NoWorkers
from millstream.broker.job import Json, Priority
from millstream.broker.registry import Registry
from millstream.broker.streams import MAX_JOBS_PER_CALL, Streams
from millstream.broker.target import find_target
from millstream.client.channel import Channel
from millstream.client.detached import Detached
from millstream.client.flights import Flights
from millstream.client.handle import Handle, Terms
from millstream.client.recall import Recall
from millstream.client.rerank import check_question
from millstream.client.result import Embeddings
from millstream.client.services import Services, op_of
from millstream.client.split import Part, split, split_evenly, split_once

JOBS_PER_WORKER = 8
MAX_ROW_BYTES = 512 * 1024
NO_HITS: Mapping[int, Cached] = MappingProxyType({})
_TEXTS, _LISTS = (str, bytes), (list, Sequence, np.ndarray)
_TENANT = re.compile(r"[A-Za-z0-9_.-]{0,64}")

PriorityName = Literal["realtime", "normal", "batch"]
_TRUNCATES: tuple[str, ...] = get_args(Truncate)
_PRIORITIES: Mapping[str, Priority] = {str(each): each for each in Priority}


class Ask(NamedTuple):
    """What a caller may say about a call. `timeout` in seconds, for all of it; `options` go to the model.

    `op` is the operation that the service must run; an empty one is whatever it does.
    """

    priority: PriorityName = "normal"
    timeout: float | None = None
    wait: bool = True
    tenant: str = ""
    options: Mapping[str, Json] = MappingProxyType({})
    op: str = ""

    def check(self) -> None:
        """Raises InvalidRequest."""
        if not isinstance(self.priority, str) or self.priority not in _PRIORITIES:
            raise InvalidRequest(f"no priority {self.priority!r}", hint=f"one of {', '.join(Priority)}")
        if self.timeout is not None and not (isinstance(self.timeout, int | float) and self.timeout > 0):
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


class Calls:
    """One process's calls to one server. Survives os.fork: the child gets an identity and threads of its own."""

    def __init__(self, url: str | None, prefix: str | None) -> None:
        target = find_target(url, prefix, os.environ)
        self.connection = Connection(target.url, name="millstream-client")
        self.registry = Registry(self.connection, target.prefix)
        self.channel = Channel(self.connection, self.registry)
        self._flights = Flights(self.channel)
        self.services = Services(self.connection, self.registry)
        self._recall = Recall(self.connection, self.registry)
        _living.add(self)
        # Not at exit: threads that wait then end with the process, and say nothing.
        weakref.finalize(self, self.channel.close).atexit = False

    def start(self, service: str, inputs: Sequence[Json], ask: Ask) -> Handle:
        """Send `inputs`, one a row, and return at once. Raises InvalidRequest, UnknownService, BrokerUnavailable."""
        ask.check()
        spec, live_workers = self.services.read(service)
        hits = self.recall(spec, inputs, ask) if spec.runtime.enable_cache else {}
        return self.begin(spec, live_workers, inputs, ask, hits)

    def recall(self, spec: ServiceSpec, inputs: Sequence[Json], ask: Ask) -> Mapping[int, Cached]:
        """What the cache of a service that was read has for `inputs`, by row; nothing where the server is too slow.

        Waits for the server: LOOK_UP_S at most for each CHUNK of rows.
        """
        recipe, texts = self._kept_rows(spec, inputs)
        return self._recall.rows(spec.name, recipe, texts, ask.options) if recipe and texts else {}

    def recall_soon(
        self, spec: ServiceSpec, inputs: Sequence[Json], ask: Ask, told: Callable[[Mapping[int, Cached]], object]
    ) -> None:
        """Hand what `recall` finds to `told`, from another thread. Returns at once."""
        recipe, texts = self._kept_rows(spec, inputs)
        if recipe and texts:
            self._recall.soon(spec.name, recipe, texts, ask.options, told)
        else:
            told({})

    def _kept_rows(self, spec: ServiceSpec, inputs: Sequence[Json]) -> tuple[Recipe | None, dict[int, str]]:
        """The recipe and texts, by row, of answers that may be kept; no recipe while the weights are unknown."""
        fingerprint = self.services.fingerprint(spec.name)
        sizes, _ = row_sizes(inputs)
        recipe = Recipe.of(spec, fingerprint, op_of(spec)) if fingerprint else None
        return recipe, {row: str(inputs[row]) for row in sizes}

    def begin(
        self,
        spec: ServiceSpec,
        live_workers: int,
        inputs: Sequence[Json],
        ask: Ask,
        hits: Mapping[int, Cached] = NO_HITS,
    ) -> Handle:
        """The same for a checked `ask`, a service that was read and what `recall` found: waits for nothing."""
        op, beside = checked(spec, ask)
        self.check_options(spec, ask.options)
        inputs = outgoing(spec, inputs, ask.options)
        parts, refused = cut(spec, inputs, hits, beside)
        limits = spec.runtime.limits(ask.priority)
        terms = Terms(
            service=spec.name,
            op=op,
            priority=_PRIORITIES[ask.priority],
            options=ask.options,
            timeout=ask.timeout,
            total_timeout=limits.total_timeout,
            queue_timeout=limits.queue_timeout,
            wait=ask.wait,
            window=_window(spec, live_workers),
            tenant=ask.tenant,
            replicated=spec.replicated,
        )
        # Where answers are kept, those of jobs under way are shared, too.
        channel = self._flights if spec.runtime.enable_cache else self.channel
        return Handle(channel, terms, inputs, parts, {**refused, **hits} if refused or hits else {}, self._why_late)

    def check_options(self, spec: ServiceSpec, options: Mapping[str, Json]) -> None:
        """Raises InvalidRequest for options that the model of `spec` would refuse for every row."""
        if options and spec.model.type == "embedding":
            EmbedOptions.read(options)

    def leave(self, service: str, inputs: Sequence[Json], ask: Ask, idempotency_key: str | None) -> Detached:
        """Client.submit_detached."""
        return Detached.submit(self, service, inputs, ask, idempotency_key)

    def streams(self, service: str) -> Streams:
        """The job streams of `service`, for calls that go past the channel."""
        return Streams(self.connection.client, self.registry.keys(service))

    def after_fork(self) -> None:
        self.connection.after_fork()
        self.channel.after_fork()
        self._flights.after_fork()
        self.services.after_fork()
        self._recall.begin()

    def _why_late(self, service: str) -> MillstreamError:
        """The error of a call whose time is over: is the server gone, every worker dead, or all of them busy?"""
        try:
            live = self.services.live_workers(service)
        except MillstreamError as error:
            return error
        paused = self.services.paused(service)
        if not live:
            start = "start one with `millstream up` or `millstream worker run`"
            return NoWorkers(
                f"no worker of service {service!r} is alive; the job was accepted and waited in vain",
                hint=f"{start}; paused, too: {resume_hint(service)}" if paused else start,
            )
        if paused:
            return DeadlineExceeded(
                f"no answer from service {service!r} in time: it is paused", hint=resume_hint(service)
            )
        return DeadlineExceeded(
            f"no answer from service {service!r} in time, with {live} workers alive",
            hint="see `millstream queue ls`; raise the timeout or add workers",
        )


def checked(spec: ServiceSpec, ask: Ask) -> tuple[str, int]:
    """The operation of a call's jobs, and the bytes that are read with each row. Raises InvalidRequest."""
    op = op_of(spec)
    # A user's own code may answer vectors.
    if ask.op and ask.op != op and not (ask.op == "embed" and op in ("call", "echo")):
        raise InvalidRequest(f"service {spec.name!r} is of type {spec.model.type!r}", hint=f"it cannot {ask.op}")
    return op, check_question(ask.options) if op == "rerank" else 0


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


def outgoing(spec: ServiceSpec, inputs: Sequence[Json], options: Mapping[str, Json]) -> Sequence[Json]:
    """The rows as they travel: of a custom service any JSON, encoded now, so that its caller may change it later.

    What JSON cannot carry becomes its row's error. Raises InvalidRequest where these are no rows, or options are given.
    """
    if spec.model.type != "custom":
        return inputs
    if options:
        raise InvalidRequest(f"service {spec.name!r} takes no options", hint="put them into the payload")
    if isinstance(inputs, _TEXTS) or not isinstance(inputs, _LISTS):
        raise InvalidRequest(
            f"a list of payloads is needed, not {type(inputs).__name__}", hint="`call` takes a single one"
        )
    return cast(Sequence[Json], [_as_json(payload) for payload in inputs])


def _as_json(payload: object) -> JsonText | InvalidRequest:
    try:
        return encode_value(payload)
    except (TypeError, ValueError) as error:
        return InvalidRequest(f"no JSON value: {error}"[:500], hint="convert it first")


def row_sizes(inputs: Sequence[object], beside: int = 0) -> tuple[dict[int, int], dict[int, MillstreamError]]:
    """Each good row's size in UTF-8 bytes, each bad row's error. Raises InvalidRequest where `inputs` is no list.

    `beside` are bytes that the model reads with each row: a reranker's query.
    """
    if isinstance(inputs, _TEXTS) or not isinstance(inputs, _LISTS):
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

    Raises InvalidRequest where the model gives no vectors.
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


def _window(spec: ServiceSpec, live_workers: int) -> int:
    """Jobs one call keeps under way: enough to keep every worker busy, never most of the queue."""
    jobs = JOBS_PER_WORKER * max(1, live_workers)
    return max(1, min(jobs, spec.runtime.max_queue_size // 4, MAX_JOBS_PER_CALL))


_living: weakref.WeakSet[Calls] = weakref.WeakSet()


def _forked() -> None:
    for calls in list(_living):
        calls.after_fork()


os.register_at_fork(after_in_child=_forked)
