"""The settings of config.yaml for models, services and Redis: frozen pydantic models, presets, defaults by type."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal, get_args

from pydantic import Field, ValidationError, model_validator

from millstream.broker.config.fair import OptionalFair
from millstream.broker.config.fields import (
    BatchTokens,
    Count,
    CountOrZero,
    Device,
    Duration,
    Handler,
    HomePath,
    Kernels,
    KeyPrefix,
    Limit,
    OptionalDuration,
    PathBelow,
    Rate,
    RedisUrl,
    Section,
    ServiceName,
    Settings,
    Size,
    Span,
    UpstreamUrl,
    Variable,
)
from millstream.broker.config.queue_size import JobsOrQueueSize, QueueSize
from millstream.broker.config.rate_limit import OptionalRateLimit
from millstream.broker.contract.errors import ConfigError
from millstream.broker.contract.operations import (
    OPERATIONS,
    UPSTREAM_BACKENDS,
    Backend,
    ModelType,
    Operation,
    operation_of,
)

Preset = Literal["latency", "balanced", "throughput"]
PriorityName = Literal["realtime", "normal", "batch"]

PRESETS: Mapping[str, Mapping[str, object]] = {
    "latency": {"batch_size": 8, "batch_timeout": 0.01},
    "balanced": {"batch_size": 32, "batch_timeout": 0.05},
    "throughput": {"batch_size": 64, "batch_timeout": 0.1},
}

LEAST_STALL_S = 30.0
"""Shortest stall timeout that is derived from the inference timeouts, seconds."""

UNKNOWN_TOKENS = 2_048
"""Tokens of a batch if `max_batch_tokens` is auto and no worker has measured it."""

RESULT_TTL_S = 3_600.0
"""Default of `redis.result_ttl`, seconds."""

CACHE_TTL_S = 3_600.0
"""Default of `runtime.cache_ttl`, seconds."""

WEIGHTS: Mapping[PriorityName, float] = {"realtime": 7.0, "normal": 2.0, "batch": 1.0}
"""Default `share` of each priority."""

OWN_KEYS = ("handler", "api_key_file", "api_key_env")
"""Keys of a model that only a worker's own file may set: they are neither written to Redis nor read from it."""


def with_defaults(model_type: str, settings: Mapping[str, object]) -> dict[str, object]:
    """Returns the settings of a service with the defaults of its model's type and of its preset."""
    operation = OPERATIONS.get(model_type)
    by_type = operation.defaults if operation else {}
    return {**by_type, **PRESETS.get(str(settings.get("preset")), {}), **settings}


class PriorityLimits(Settings):
    """Limits of one priority of a service; None takes the service's value.

    `share` is the priority's weight relative to the other priorities when all have jobs waiting.
    """

    share: Rate | None = None
    queue_timeout: Limit = None
    inference_timeout: Limit = None
    total_timeout: Limit = None
    max_queue_size: Count | None = None
    batch_timeout: OptionalDuration = None


class Runtime(Settings):
    """A service's limits. Times are in seconds, `memory_limit` is in bytes; None is no limit.

    `max_queue_size` limits the jobs of each priority by itself, those that run included. Of the `batch_size` slots of a
    text generator, `reserved_slots` run realtime jobs only. `target`: response time of realtime and normal jobs to aim
    at.
    """

    batch_size: Count = 32
    batch_timeout: Duration = 0.01
    max_queue_size: JobsOrQueueSize = 10_000
    worker_count: Count = 1
    queue_timeout: Limit = None
    inference_timeout: Limit = None
    total_timeout: Limit = 60.0
    rate_limit: OptionalRateLimit = None
    enable_cache: bool = False
    preset: Preset | None = None
    max_batch_tokens: BatchTokens = 2_048
    stall_timeout: Limit = None
    max_attempts: Count = 3
    memory_limit: Size | None = None
    cache_ttl: Limit = None
    truncate: Literal["none", "start", "end"] = "none"
    reserved_slots: CountOrZero = 0
    fair: OptionalFair = None
    target: Limit = None
    priorities: Section[dict[PriorityName, Section[PriorityLimits]]] = Field(default={})

    @classmethod
    def of(cls, model_type: str, **settings: object) -> Runtime:
        """Returns the settings of a service whose model is of this type, as config.yaml gives them.

        Raises pydantic.ValidationError.
        """
        return cls.model_validate(with_defaults(model_type, settings))

    def limits(self, priority: PriorityName) -> PriorityLimits:
        """Returns the limits of one priority: its own if given, otherwise the service's.

        The priority batch does not inherit queue_timeout and total_timeout, because batch jobs may wait long.
        """
        return self._limits[priority]

    @cached_property
    def _limits(self) -> dict[PriorityName, PriorityLimits]:
        # Every call reads the limits, and validating them is slow.
        names: tuple[PriorityName, ...] = get_args(PriorityName)
        return {name: self._merged(name) for name in names}

    def _merged(self, priority: PriorityName) -> PriorityLimits:
        own = self.priorities.get(priority, PriorityLimits())
        inherited = {
            "queue_timeout": None if priority == "batch" else self.queue_timeout,
            "inference_timeout": self.inference_timeout,
            "total_timeout": None if priority == "batch" else self.total_timeout,
            "batch_timeout": self.batch_timeout,
            "max_queue_size": self._queue_jobs,
        }
        return PriorityLimits.model_validate(inherited | own.model_dump(exclude_none=True))

    def queue_size(self, priority: PriorityName) -> int:
        """Returns the most jobs of one priority that the queue holds: its own `max_queue_size`, or the service's."""
        return self.limits(priority).max_queue_size or self._queue_jobs

    @property
    def _queue_jobs(self) -> int:
        return self.max_queue_size.jobs if isinstance(self.max_queue_size, QueueSize) else self.max_queue_size

    @property
    def tenant_jobs(self) -> int | None:
        """Most jobs of one tenant that may wait in each priority; None is no limit of its own."""
        return self.max_queue_size.per_tenant if isinstance(self.max_queue_size, QueueSize) else None

    @property
    def shares(self) -> dict[PriorityName, float]:
        """Share of the workers, 0 to 1, that each priority gets at least while more urgent ones saturate them."""
        names: tuple[PriorityName, ...] = get_args(PriorityName)
        weights = {name: self.priorities.get(name, PriorityLimits()).share or WEIGHTS[name] for name in names}
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    @property
    def cache_s(self) -> float | None:
        """Seconds for which the cache keeps an answer; None if the cache is off."""
        return (self.cache_ttl or CACHE_TTL_S) if self.enable_cache else None

    @property
    def batch_tokens(self) -> int:
        """`max_batch_tokens` as a number: UNKNOWN_TOKENS if it is auto."""
        return UNKNOWN_TOKENS if self.max_batch_tokens == "auto" else self.max_batch_tokens

    @property
    def row_tokens(self) -> int:
        """Tokens counted for a row whose length is unknown: `batch_tokens` / `batch_size`, at least 1."""
        return max(1, self.batch_tokens // self.batch_size)

    @property
    def stall_s(self) -> float:
        """Seconds that a forward may take before its process counts as stuck.

        `stall_timeout` if it is set, otherwise 10 times the longest inference timeout, at least LEAST_STALL_S.
        """
        limits = [self.inference_timeout, *(each.inference_timeout for each in self.priorities.values())]
        return self.stall_timeout or max(LEAST_STALL_S, *(10 * (limit or 0.0) for limit in limits))


class ModelSpec(Settings):
    """The weights to run and how to run them.

    If `device` is None, the best device of the host is used; if `max_length` is None, the model's own limit.
    """

    type: ModelType
    model_name: str = ""
    # auto: the model's own files decide how it is used.
    kind: Literal["auto", "query_likelihood"] = "auto"
    device: Device = None
    # Assigned to the worker processes in turn, instead of `device`.
    devices: tuple[str, ...] = ()
    revision: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "float32"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    # auto: faster kernels replace the library's own if they prove equal; off: never.
    kernels: Kernels = "auto"
    # The library that runs the weights, or the kind of server at `url`. For onnx and openvino `model_file` is the
    # exported file in the model's folder.
    backend: Backend = "torch"
    model_file: PathBelow | None = None
    max_length: Count | None = None
    warmup: bool | None = None
    priority: int | None = None
    # In a pool: it never leaves the memory.
    keep: bool = False
    # Only a worker's own file names code: a handler is neither written to Redis nor read from it.
    handler: Handler | None = Field(default=None, exclude=True)
    # A server that already runs, see UPSTREAM_BACKENDS.
    url: UpstreamUrl | None = None
    # Only a worker's own file says where the key of that server is: neither is written to Redis or read from it.
    api_key_file: HomePath | None = Field(default=None, exclude=True)
    api_key_env: Variable | None = Field(default=None, exclude=True)

    # Looked up once: each call of a client reads it several times.
    @cached_property
    def operation(self) -> Operation:
        """The record of the model's type: everything that differs between types."""
        return operation_of(self.type, self.backend)

    @property
    def is_upstream(self) -> bool:
        """Whether a server that already runs computes the results."""
        return self.backend in UPSTREAM_BACKENDS


class RedisSettings(Settings):
    """The Redis server and how to use it. `data_dir` is the embedded server's folder; `result_ttl` is in seconds."""

    url: RedisUrl = None
    password_file: HomePath | None = None
    insecure: bool = False
    allow_eviction: bool = False
    key_prefix: KeyPrefix = "ms"
    result_ttl: Span = RESULT_TTL_S
    durability: Literal["everysec", "always", "replicated"] = "everysec"
    data_dir: HomePath | None = None


class ServiceSpec(Settings):
    """One service with every default filled in. `model_ref` is the model's name in config.yaml.

    `result_ttl` is the time in seconds for which the results of a detached call are kept after the last one. If
    `replicated`, a job counts as accepted only when a replica of the server has it. `webhooks`: starts of the
    URLs that a detached call may name.
    """

    name: ServiceName
    model: ModelSpec
    model_ref: str
    runtime: Runtime
    result_ttl: float = RESULT_TTL_S
    replicated: bool = False
    webhooks: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _caches_only_what_can_be(self) -> ServiceSpec:
        if self.runtime.enable_cache and self.model.operation.uncached:
            raise ValueError(no_cache(self.model.operation))
        return self

    @property
    def limits_tenants(self) -> bool:
        """Whether a limit counts each tenant apart, so that one may be refused and another accepted."""
        rate = self.runtime.rate_limit
        return self.runtime.tenant_jobs is not None or (rate is not None and rate.per == "tenant")

    def with_handler(self, handler: str | None) -> ServiceSpec:
        """Returns a copy with the code that this host's own file names for the service."""
        return self.model_copy(update={"model": self.model.model_copy(update={"handler": handler})})

    def with_key(self, own: ModelSpec | None) -> ServiceSpec:
        """Returns a copy with the place of the server's key that `own`, this host's own file, names.

        The copy has none if `own` names another server: who may write services must not learn the key.
        """
        keys = {"api_key_file": None, "api_key_env": None}
        if own and own.url == self.model.url:
            keys |= {name: getattr(own, name) for name in keys}
        return self.model_copy(update={"model": self.model.model_copy(update=keys)})

    def to_json(self) -> str:
        """Returns the record for the registry, without OWN_KEYS. Equal specs give equal text."""
        # Newer keys are omitted while they have their defaults, so that older versions write the same record.
        off: dict[str, bool | set[str]] = {} if self.replicated else {"replicated": True}
        if not self.webhooks:
            off["webhooks"] = True
        newer = ("attention", "backend", "keep", "kernels", "kind", "model_file", "url")
        off["model"] = {name for name in newer if getattr(self.model, name) == ModelSpec.model_fields[name].default}
        newer_runtime = ("fair", "reserved_slots", "target")
        off["runtime"] = {name for name in newer_runtime if not getattr(self.runtime, name)}
        return self.model_dump_json(exclude=off)

    @classmethod
    def from_json(cls, text: str | bytes) -> ServiceSpec:
        """Returns the spec in a registry's record. Ignores unknown keys, which a newer version may have written.

        Raises ConfigError if the record cannot be read.
        """
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _unreadable("not JSON") from error
        for key in OWN_KEYS:
            discard(record, ("model", key))
        try:
            for path in _unknown_keys(record):
                discard(record, path)
            return cls.model_validate(record)
        except ValidationError as error:
            first = error.errors()[0]
            raise _unreadable(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _unknown_keys(record: object) -> list[Sequence[str | int]]:
    try:
        ServiceSpec.model_validate(record)
    except ValidationError as error:
        return [each["loc"] for each in error.errors() if each["type"] == "extra_forbidden"]
    return []


def _unreadable(reason: str) -> ConfigError:
    message = f"a service's record in Redis cannot be read: {reason}"
    return ConfigError(message, hint="write it again with `millstream config push --replace`")


def no_cache(operation: Operation) -> str:
    """Returns the error for `enable_cache` on a service whose answers cannot be cached."""
    return f"a service of type {operation.type} has no cache: {operation.uncached}; leave enable_cache out"


def discard(tree: object, path: Sequence[str | int]) -> None:
    """Deletes the value at `path` from nested dicts. Does nothing if a key is missing.

    If a key before the last one holds no dict, that key is deleted instead.
    """
    for depth, key in enumerate(path):
        if not isinstance(tree, dict) or key not in tree:
            return
        if depth == len(path) - 1 or not isinstance(tree[key], dict):
            del tree[key]
            return
        tree = tree[key]
