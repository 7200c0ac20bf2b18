"""The blocking client: thread-safe, one channel a process behind it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Literal, cast, get_args

import numpy as np

from millstream.broker.config import DEFAULT_PATH, Config, ServiceSpec, load
from millstream.broker.connection import Connection, find_url
from millstream.broker.errors import DeadlineExceeded, InputTooLong, InvalidRequest, MillstreamError, NoWorkers
from millstream.broker.job import Json, Priority, Vectors
from millstream.broker.keys import DEFAULT_PREFIX
from millstream.broker.registry import Registry
from millstream.broker.streams import MAX_JOBS_PER_CALL
from millstream.client.channel import Channel
from millstream.client.handle import Handle, Terms
from millstream.client.result import Embeddings
from millstream.client.services import Services, op_of
from millstream.client.split import split

JOBS_PER_WORKER = 8
MAX_ROW_BYTES = 512 * 1024

Truncate = Literal["none", "start", "end"]
PriorityName = Literal["realtime", "normal", "batch"]


class Client:
    """Calls services through the queue.

    Without `url` it takes MILLSTREAM_REDIS_URL, then ./config.yaml, then the server of a local `millstream up`.
    Raises ConfigError or BrokerUnavailable where none of them says where the queue is; connects on the first call.
    """

    def __init__(self, url: str | None = None, *, prefix: str | None = None) -> None:
        config = _config_here() if url is None or prefix is None else None
        self._connection = Connection(find_url(url, config, os.environ), name="millstream-client")
        found_prefix = config.redis.key_prefix if config else DEFAULT_PREFIX
        self._registry = Registry(self._connection, prefix or found_prefix)
        self._channel = Channel(self._connection, self._registry)
        self._services = Services(self._connection, self._registry)

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        service: str | None = None,
        priority: PriorityName = "normal",
        timeout: float | None = None,
        wait: bool = True,
        truncate: Truncate | None = None,
        tenant: str = "",
    ) -> Embeddings:
        """Vectors of `texts`, float32 [len(texts), dim] in the order given; [dim] for a single str.

        `service` may be left out where one embedding service is registered. `timeout` is seconds for the whole call;
        without it each job has the service's total_timeout. `wait=False` raises QueueFull at once instead of waiting
        for room. `truncate` "start" or "end" cuts texts that are too long, and reports them in `.truncated`.

        Raises DeadlineExceeded, NoWorkers, QueueFull (with retry_after, seconds), InvalidRequest, InputTooLong,
        UnknownService, BrokerUnavailable; PartialFailure (errors by index) where only some texts failed.
        """
        single = isinstance(texts, str)
        rows = [texts] if single else texts
        options: dict[str, Json] = {} if truncate is None else {"truncate": truncate}
        name = service or self._services.only("embedding")
        handle = self.submit(
            name, cast(Sequence[Json], rows), priority=priority, timeout=timeout, wait=wait, tenant=tenant, **options
        )
        result = handle.result()
        vectors = result if isinstance(result, Embeddings) else Embeddings.of(_empty(), 0, (), {})
        return cast(Embeddings, vectors[0]) if single else vectors

    def submit(
        self,
        service: str,
        inputs: Sequence[Json],
        *,
        priority: PriorityName = "normal",
        timeout: float | None = None,
        wait: bool = True,
        tenant: str = "",
        **options: Json,
    ) -> Handle:
        """Send `inputs`, one a row, and return at once; the handle's `result` waits. Raises as `embed` does.

        `options` go to the model, for an embedding service `truncate`.
        """
        if isinstance(inputs, str | bytes) or not isinstance(inputs, Sequence):
            raise InvalidRequest(f"a list of strings is needed, not {type(inputs).__name__}")
        spec, live_workers = self._services.read(service)
        terms = Terms(
            service=service,
            op=op_of(spec),
            priority=_priority(priority),
            options=_options(options),
            timeout=_seconds("timeout", timeout),
            total_timeout=spec.runtime.total_timeout,
            # A batch job is in no hurry, unless its service says otherwise for batch jobs.
            queue_timeout=None if priority == "batch" else spec.runtime.queue_timeout,
            wait=wait,
            window=_window(spec, live_workers),
            tenant=tenant,
        )
        sizes, refused = _measure(inputs)
        tokens = spec.runtime.max_batch_tokens
        parts = split(sizes, spec.runtime.batch_size, tokens if isinstance(tokens, int) else 2_048)
        return Handle(self._channel, terms, inputs, parts, refused, self._why_late)

    @property
    def stray_replies(self) -> int:
        """Replies that came for no waiting call: after its timeout, or read twice around a cut connection."""
        return self._channel.stray_replies

    def close(self) -> None:
        """End the client's threads and connections. Calls under way in other threads get BrokerUnavailable."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _why_late(self, service: str) -> MillstreamError:
        """The error of a call whose time is over: is the server gone, every worker dead, or all of them busy?"""
        try:
            live = self._services.live_workers(service)
        except MillstreamError as error:
            return error
        if not live:
            return NoWorkers(
                f"no worker of service {service!r} is alive; the job was accepted and waited in vain",
                hint="start one with `millstream up` or `millstream worker run`",
            )
        return DeadlineExceeded(
            f"no answer from service {service!r} in time, with {live} workers alive",
            hint="see `millstream queue ls`; raise the timeout or add workers",
        )


def _config_here() -> Config | None:
    return load(DEFAULT_PATH) if DEFAULT_PATH.is_file() else None


def _empty() -> Vectors:
    return np.zeros((0, 0), dtype=np.float32)


def _priority(name: str) -> Priority:
    try:
        return Priority(name)
    except ValueError:
        raise InvalidRequest(f"no priority {name!r}", hint=f"one of {', '.join(Priority)}") from None


def _seconds(name: str, value: float | None) -> float | None:
    if value is not None and not (isinstance(value, int | float) and value > 0):
        raise InvalidRequest(f"{name}={value!r} is not a number of seconds above 0")
    return value


def _options(options: Mapping[str, Json]) -> Mapping[str, Json]:
    truncate = options.get("truncate", "none")
    if truncate not in get_args(Truncate):
        raise InvalidRequest(f"truncate={truncate!r}", hint=f"one of {', '.join(get_args(Truncate))}")
    return options


def _measure(inputs: Sequence[object]) -> tuple[dict[int, int], dict[int, MillstreamError]]:
    """Each good row's size in UTF-8 bytes; each bad row's error. A bad row costs its neighbours nothing."""
    sizes: dict[int, int] = {}
    refused: dict[int, MillstreamError] = {}
    for row, text in enumerate(inputs):
        if not isinstance(text, str):
            refused[row] = InvalidRequest(f"not a string but {type(text).__name__}", hint="convert it first")
            continue
        try:
            sizes[row] = len(text.encode())
        except UnicodeEncodeError as error:
            refused[row] = InvalidRequest(f"not valid Unicode: {error.reason} at character {error.start}")
            continue
        if sizes[row] > MAX_ROW_BYTES:
            refused[row] = InputTooLong(f"{sizes.pop(row)} bytes, at most {MAX_ROW_BYTES} travel in one row")
    return sizes, refused


def _window(spec: ServiceSpec, live_workers: int) -> int:
    """Jobs one call keeps under way: enough to keep every worker busy, never most of the queue."""
    jobs = JOBS_PER_WORKER * max(1, live_workers)
    return max(1, min(jobs, spec.runtime.max_queue_size // 4, MAX_JOBS_PER_CALL))
