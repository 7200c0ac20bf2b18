"""Services registered in Redis, so that workers and clients need only the server's URL."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple, cast

from redis import WatchError
from redis.typing import EncodableT, FieldT

from millstream.broker.config.load import ServiceSpec
from millstream.broker.config.route import RouteSpec
from millstream.broker.config.spec import discard
from millstream.broker.contract.answer import (
    Answer,
    allowed_distance,
    answer_field,
    decode_answer,
    distance,
    encode_answer,
    is_answer,
)
from millstream.broker.contract.errors import ConfigError, QueueFull, UnknownService, did_you_mean
from millstream.broker.contract.keys import DEFAULT_PREFIX, ServiceKeys, services_key
from millstream.broker.queue.admission import FAIR_FIELD, WAS_FAIR, WEIGHT, limit_fields
from millstream.broker.queue.canary_weights import read_with_canary
from millstream.broker.queue.lease import Lease
from millstream.broker.queue.streams import Streams
from millstream.broker.transport.cluster import owner
from millstream.broker.transport.connection import Connection, translated

SPEC_VERSION = 1
"""Version of the format of a registered service."""

ROUTE = "route"
"""Field of a service with its route, as JSON; see routes.py. A route whose name is no service's has no other field."""

TOKEN = "token"
"""Field of a service with a random text, which changes if the server loses its data."""

Record = Mapping[bytes, bytes]
"""All fields of a registered service, as the server stores them."""


class Registered(NamedTuple):
    """A service on the server. `fingerprint` is "" until the first worker writes it.

    If `token` changes, the server has lost its data, and all jobs. It is "" if an older version wrote the service.
    """

    spec: ServiceSpec
    fingerprint: str
    token: str = ""


def record_of(spec: ServiceSpec) -> Record:
    """Returns the record of `spec` as a push writes it."""
    return {str(name).encode(): _bytes(value) for name, value in _fields(spec).items()}


class Registry:
    """The services of one server under one key prefix."""

    def __init__(self, connection: Connection, prefix: str = DEFAULT_PREFIX) -> None:
        self._connection = connection
        self._prefix = self.prefix = prefix

    def keys(self, service: str) -> ServiceKeys:
        return ServiceKeys(service, self._prefix)

    def push(self, specs: Iterable[ServiceSpec], replace: bool = False) -> list[str]:
        """Registers `specs`. Returns the names of those that are new or changed.

        Raises ConfigError if one is registered with other settings, unless `replace`: all hosts of a service must run
        the same settings.
        """
        specs = list(specs)
        with translated(self._connection.safe_url):
            # All are compared before the first is written, so a refused push writes nothing.
            changed = [spec for spec in specs if self._differs(spec, replace)]
            for spec in changed:
                self._write(spec)
            for spec in specs if replace else ():
                self._forget_fingerprint(self.keys(spec.name))
        return [spec.name for spec in changed]

    def claim_fingerprint(self, service: str, fingerprint: str, answer: Answer | None = None) -> None:
        """Registers the weights of a worker. Raises ConfigError if the service's first worker has other weights.

        The first worker decides, because vectors of two models in one reply would be useless. `answer` is the worker's
        answer to a fixed text. That of the first worker is stored; if a later one differs by more than devices and
        libraries explain, its worker is refused even if the fingerprints are equal.
        """
        standing = self._first(service, "fingerprint", fingerprint)
        if standing != fingerprint:
            raise ConfigError(
                f"service {service!r} runs {standing}, this worker has {fingerprint}",
                hint="run the same weights, revision and dtype, or code, on every host; to change them for all, stop "
                "the workers, then run `millstream config push --replace` or `serve(..., replace=True)`",
            )
        if answer is not None:
            first = self._first_answer(service, fingerprint, answer)
            if (far := distance(first, answer, fingerprint)) > allowed_distance(fingerprint):
                raise ConfigError(
                    f"service {service!r} runs {standing}, and so does this worker, but its answer to a fixed text "
                    f"differs from the first worker's by {far:.2g} of that answer's length",
                    hint="run the same releases of torch, transformers and sentence-transformers on every host; if the "
                    "first worker was wrong, stop all of them, then run `millstream config push --replace`",
                )

    def _first(self, service: str, field: str, value: str) -> str:
        """Writes `value` to `field` if it is empty. Returns what the field has then."""
        spec = self.keys(service).spec()
        with translated(self._connection.safe_url):
            # Read first: at maxmemory the server refuses writes, but a worker must be able to start.
            if self._connection.client.hget(spec, field) is None:
                self._connection.client.hsetnx(spec, field, value)
            return _text(self._connection.client.hget(spec, field) or value)

    def _first_answer(self, service: str, fingerprint: str, answer: Answer) -> Answer:
        """Returns the answer of the first worker with that fingerprint: `answer` if none can be stored yet."""
        text = encode_answer(answer)
        # A worker must start although the server is full: the next worker, or this one after a push, writes the answer.
        with suppress(QueueFull):
            text = self._first(service, answer_field(fingerprint), text)
        return decode_answer(text)

    def read(self, service: str) -> ServiceSpec:
        """Returns the specification of `service`. Raises UnknownService, with the most similar name."""
        return self.describe(service).spec

    def describe(self, service: str) -> Registered:
        """Returns the service as it is registered. Raises UnknownService, with the most similar name."""
        registered, route = self.look_up(service)
        if registered is None:
            raise self.unknown(service, route)
        return registered

    def look_up(self, name: str) -> tuple[Registered | None, RouteSpec | None]:
        """Returns the service and the route of this name, None for each that is not registered.

        One round trip, and another one if a canary has changed the weights of the route.
        """
        keys, client = self.keys(name), self._connection.client
        with translated(self._connection.safe_url):
            stored, fingerprint, token, record = client.hmget(keys.spec(), "spec", "fingerprint", TOKEN, ROUTE)
            route = read_with_canary(client, keys, cast(bytes | None, record))
        registered = None
        if stored is not None:
            registered = Registered(ServiceSpec.from_json(_text(stored)), _text(fingerprint or ""), _text(token or ""))
        return registered, route

    def record(self, service: str) -> Record | None:
        """Returns the record of `service`; None if the server does not have it, or its name is not registered."""
        with translated(self._connection.safe_url):
            record = self._connection.client.hgetall(self.keys(service).spec())
        return cast(Record, record) if b"spec" in record and service in self.names() else None

    def restore(self, service: str, record: Record) -> bool:
        """Writes the `record` of a service that the server has lost. Returns False if it is registered again."""
        keys = self.keys(service)
        with translated(self._connection.safe_url):
            Streams(self._connection.client, keys).create_groups()
            self._connection.client.sadd(services_key(self._prefix), service)
            with owner(self._connection.client, keys.spec()).pipeline() as pipe, suppress(WatchError):
                # The first write after the loss wins: it may be a newer push.
                pipe.watch(keys.spec())  # type: ignore[no-untyped-call]
                if pipe.hget(keys.spec(), "spec") is None:
                    # A revision that no worker has seen, so each reads the service and registers its weights again.
                    now, _ = owner(self._connection.client, keys.spec()).time()
                    fields: dict[FieldT, EncodableT] = {**dict(record.items())}
                    fields |= {TOKEN.encode(): _new_token(), b"revision": 1000 * int(now)}
                    pipe.multi()
                    pipe.hset(keys.spec(), mapping=fields)
                    pipe.execute()
                    return True
        return False

    def unregistered(self, route: RouteSpec, version: str) -> UnknownService:
        """Returns the error for a call to a version whose service is not registered."""
        return UnknownService(
            f"route {route.name!r}: no service {route.services[version]!r}, its version {version!r}",
            hint="register it with `millstream config push`, or change the weights: `millstream route set`",
        )

    def names(self) -> list[str]:
        """Returns the names of the registered services, sorted."""
        with translated(self._connection.safe_url):
            return sorted(_text(name) for name in self._connection.client.smembers(services_key(self._prefix)))

    def unknown(self, service: str, route: RouteSpec | None = None) -> UnknownService:
        """Returns the error for a name that is no service's. `route` is the route of that name, if there is one."""
        if route:
            services = ", ".join(route.services.values())
            return UnknownService(f"{service!r} is a route, not a service", hint=f"its services are {services}")
        names = self.names()
        near = did_you_mean(service, names)
        if near:
            hint = f"did you mean {near}?"
        elif names:
            hint = f"registered here: {', '.join(names)}"
        else:
            hint = "none is registered here: run `millstream up` or `millstream config push`"
        return UnknownService(f"no service {service!r} on {self._connection.safe_url}", did_you_mean=near, hint=hint)

    def _differs(self, spec: ServiceSpec, replace: bool) -> bool:
        stored = self._connection.client.hget(self.keys(spec.name).spec(), "spec")
        if stored is None:
            return True
        ours, theirs = _shared(_record(spec.to_json())), _shared(_record(stored))
        if ours == theirs:
            return False
        if not replace:
            raise ConfigError(
                f"service {spec.name!r} is registered on {self._connection.safe_url} with other settings: "
                f"{_difference(theirs, ours)}",
                hint="push with --replace to change it, or take the registered settings over",
            )
        return True

    def _write(self, spec: ServiceSpec) -> None:
        """Registers one service. An interrupted push leaves the old specification; pushing again completes it."""
        keys = self.keys(spec.name)
        # The specification is written last: with it the service counts as registered. On a Cluster the set of names is
        # in another slot, so it cannot be part of the transaction.
        Streams(self._connection.client, keys).create_groups()
        self._connection.client.sadd(services_key(self._prefix), spec.name)
        fields = _fields(spec)
        found = cast(Record, self._connection.client.hgetall(keys.spec()))
        removed = [name for name in found if name.startswith(WEIGHT.encode()) and name.decode() not in fields]
        if not fields[FAIR_FIELD] and found.get(FAIR_FIELD.encode()):
            fields[FAIR_FIELD] = WAS_FAIR
        with owner(self._connection.client, keys.spec()).pipeline() as pipe:
            if removed:
                pipe.hdel(keys.spec(), *removed)
            pipe.hset(keys.spec(), mapping=fields)
            pipe.hincrby(keys.spec(), "revision", 1)
            pipe.hsetnx(keys.spec(), TOKEN, _new_token())
            pipe.execute()

    def _forget_fingerprint(self, keys: ServiceKeys) -> None:
        """Deletes fingerprint and answers if no worker is alive, so that the next one may have other weights."""
        with owner(self._connection.client, keys.spec()).pipeline() as pipe, suppress(WatchError):
            # WATCH: if a worker's first heartbeat comes in between, nothing is deleted.
            pipe.watch(keys.workers(), keys.spec())  # type: ignore[no-untyped-call]
            if not Lease(self._connection.client, keys).live_workers():
                answers = [field for field in pipe.hgetall(keys.spec()) if is_answer(_text(field))]
                pipe.multi()
                pipe.hdel(keys.spec(), "fingerprint", *answers)
                pipe.execute()


def _fields(spec: ServiceSpec) -> dict[FieldT, EncodableT]:
    fields: dict[FieldT, EncodableT] = {"version": SPEC_VERSION, "spec": spec.to_json()}
    fields.update(limit_fields(spec.runtime))
    return fields


def _new_token() -> str:
    return secrets.token_hex(8)


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _shared(record: object) -> object:
    """Removes the settings that each host chooses, its devices and number of processes, and returns the record."""
    for path in (("model", "device"), ("model", "devices"), ("runtime", "worker_count")):
        discard(record, path)
    return record


def _difference(theirs: object, ours: object, path: str = "") -> str:
    """Returns the first three settings that differ, as `runtime.batch_size is 32, here 64`; "" if none does."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = sorted({*theirs, *ours})
        parts = [_difference(theirs.get(n), ours.get(n), f"{path}.{n}".lstrip(".")) for n in names]
        return ", ".join([part for part in parts if part][:3])
    return "" if theirs == ours else f"{path or 'the record'} is {theirs}, here {ours}"


def _record(stored: bytes | str) -> object:
    """Decodes a registered specification. If it is not JSON, returns a text that differs from every specification."""
    try:
        return json.loads(stored)
    except (ValueError, RecursionError):
        return "unreadable"


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
