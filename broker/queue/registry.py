"""Services published in Redis: what makes a URL enough for a worker or a client."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple, cast

from redis import WatchError
from redis.typing import EncodableT, FieldT

from millstream.broker.config.load import ServiceSpec
from millstream.broker.config.spec import discard
from millstream.broker.contract.answer import Answer, allowed, answer_field, distance, is_answer, read_answer, written
from millstream.broker.contract.errors import ConfigError, QueueFull, UnknownService, did_you_mean
from millstream.broker.contract.keys import DEFAULT_PREFIX, ServiceKeys, services_key
from millstream.broker.queue.admission import limit_fields
from millstream.broker.queue.lease import Lease
from millstream.broker.queue.streams import Streams
from millstream.broker.transport.cluster import owner
from millstream.broker.transport.connection import Connection, translated

SPEC_VERSION = 1

TOKEN = "token"
"""Field of a service: another text after each loss of the server's data."""

Record = Mapping[bytes, bytes]
"""Every field of a registered service, as the server has it."""


class Registered(NamedTuple):
    """A service on the server. `fingerprint` is "" before a worker has said it, `token` if an older version wrote it.

    Another `token` than before says that the server has lost what it had, and all jobs with it.
    """

    spec: ServiceSpec
    fingerprint: str
    token: str = ""


def record_of(spec: ServiceSpec) -> Record:
    """The record of `spec` as a push writes it."""
    return {str(name).encode(): _bytes(value) for name, value in _fields(spec).items()}


class Registry:
    """The services of one server under one key prefix."""

    def __init__(self, connection: Connection, prefix: str = DEFAULT_PREFIX) -> None:
        self._connection = connection
        self._prefix = prefix

    def keys(self, service: str) -> ServiceKeys:
        return ServiceKeys(service, self._prefix)

    def push(self, specs: Iterable[ServiceSpec], replace: bool = False) -> list[str]:
        """Publish `specs`; the names that were new or changed. Raises ConfigError where a differing one stands.

        A differing specification is only written with `replace`: two hosts must not run one queue by two plans.
        """
        specs = list(specs)
        with translated(self._connection.safe_url):
            # All are compared before any is written: a push is refused as a whole.
            changed = [spec for spec in specs if self._differs(spec, replace)]
            for spec in changed:
                self._write(spec)
            for spec in specs if replace else ():
                self._forget_fingerprint(self.keys(spec.name))
        return [spec.name for spec in changed]

    def claim_fingerprint(self, service: str, fingerprint: str, answer: Answer | None = None) -> None:
        """Say which weights a worker is about to run. Raises ConfigError where the service's others run different ones.

        The first worker of a service decides: vectors of two models in one answer would be worthless. `answer` is what
        the worker makes of a fixed text; that of the first one is kept, and one that differs by more than devices and
        libraries do is refused, whatever the fingerprint says.
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
            if (far := distance(first, answer, fingerprint)) > allowed(fingerprint):
                raise ConfigError(
                    f"service {service!r} runs {standing}, and so does this worker, but its answer to a fixed text is "
                    f"another one than the first worker's: {far:.2g} of its length apart",
                    hint="run the same releases of torch, transformers and sentence-transformers on every host; if the "
                    "first worker was wrong, stop all of them, then run `millstream config push --replace`",
                )

    def _first(self, service: str, field: str, value: str) -> str:
        """What the first worker of the service wrote to `field`: `value` if there is nothing yet."""
        spec = self.keys(service).spec()
        with translated(self._connection.safe_url):
            # Looked up first: at maxmemory a worker can read, and start, but not write.
            if self._connection.client.hget(spec, field) is None:
                self._connection.client.hsetnx(spec, field, value)
            return _text(self._connection.client.hget(spec, field) or value)

    def _first_answer(self, service: str, fingerprint: str, answer: Answer) -> Answer:
        """What the first worker of that fingerprint answered: `answer` if there is no room for one yet."""
        text = written(answer)
        # A full server must not keep a worker from starting: the next worker, or this one after a push, writes it.
        with suppress(QueueFull):
            text = self._first(service, answer_field(fingerprint), text)
        return read_answer(text)

    def read(self, service: str) -> ServiceSpec:
        """The specification of `service`. Raises UnknownService, with the nearest name there is."""
        return self.describe(service).spec

    def describe(self, service: str) -> Registered:
        """The service as it is registered. Raises UnknownService."""
        key = self.keys(service).spec()
        with translated(self._connection.safe_url):
            stored, fingerprint, token = self._connection.client.hmget(key, "spec", "fingerprint", TOKEN)
        if stored is None:
            raise self._unknown(service)
        return Registered(ServiceSpec.from_json(_text(stored)), _text(fingerprint or ""), _text(token or ""))

    def record(self, service: str) -> Record | None:
        """The record of `service`; None if the server has none, or not in the list of its services."""
        with translated(self._connection.safe_url):
            record = self._connection.client.hgetall(self.keys(service).spec())
        return cast(Record, record) if b"spec" in record and service in self.names() else None

    def restore(self, service: str, record: Record) -> bool:
        """Put back the `record` of a service that the server has lost; False if it is registered meanwhile."""
        keys = self.keys(service)
        with translated(self._connection.safe_url):
            Streams(self._connection.client, keys).create_groups()
            self._connection.client.sadd(services_key(self._prefix), service)
            with owner(self._connection.client, keys.spec()).pipeline() as pipe, suppress(WatchError):
                # Whoever writes first after the loss decides: it may be a newer push.
                pipe.watch(keys.spec())  # type: ignore[no-untyped-call]
                if pipe.hget(keys.spec(), "spec") is None:
                    # A revision that no worker has seen, so that each reads the service and says its weights again.
                    now, _ = owner(self._connection.client, keys.spec()).time()
                    fields: dict[FieldT, EncodableT] = {**dict(record.items())}
                    fields |= {TOKEN.encode(): _new_token(), b"revision": 1000 * int(now)}
                    pipe.multi()
                    pipe.hset(keys.spec(), mapping=fields)
                    pipe.execute()
                    return True
        return False

    def names(self) -> list[str]:
        """The registered services, sorted."""
        with translated(self._connection.safe_url):
            return sorted(_text(name) for name in self._connection.client.smembers(services_key(self._prefix)))

    def _unknown(self, service: str) -> UnknownService:
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
        """Publish one service. A push that is cut off leaves the old specification; the next one completes it."""
        keys = self.keys(spec.name)
        # The specification comes last: only from then on does the service count as registered. On a Cluster the set of
        # names is in another slot, so it cannot be part of the transaction.
        Streams(self._connection.client, keys).create_groups()
        self._connection.client.sadd(services_key(self._prefix), spec.name)
        with owner(self._connection.client, keys.spec()).pipeline() as pipe:
            pipe.hset(keys.spec(), mapping=_fields(spec))
            pipe.hincrby(keys.spec(), "revision", 1)
            pipe.hsetnx(keys.spec(), TOKEN, _new_token())
            pipe.execute()

    def _forget_fingerprint(self, keys: ServiceKeys) -> None:
        """Where no worker runs, the next one may bring other weights."""
        with owner(self._connection.client, keys.spec()).pipeline() as pipe, suppress(WatchError):
            # A worker whose first beat comes in between keeps its weights.
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
    """A record without what each host decides for itself: its devices, and how many processes it runs."""
    for path in (("model", "device"), ("model", "devices"), ("runtime", "worker_count")):
        discard(record, path)
    return record


def _difference(theirs: object, ours: object, path: str = "") -> str:
    """The first few settings that differ, as `runtime.batch_size is 32, here 64`."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = sorted({*theirs, *ours})
        parts = [_difference(theirs.get(n), ours.get(n), f"{path}.{n}".lstrip(".")) for n in names]
        return ", ".join([part for part in parts if part][:3])
    return "" if theirs == ours else f"{path or 'the record'} is {theirs}, here {ours}"


def _record(stored: bytes | str) -> object:
    """What is registered, as JSON; a text where it is none, which differs from every specification."""
    try:
        return json.loads(stored)
    except (ValueError, RecursionError):
        return "unreadable"


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
