"""Versions of a custom service, for tests of routes: each row's answer is the version that made it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from millstream.broker.config.route import RouteSpec
from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.queue.routes import Routes
from millstream.broker.transport.connection import Connection

ANSWERS = """
import time

def v1(payloads):
    return ["v1"] * len(payloads)

def v2(payloads):
    return ["v2"] * len(payloads)

def slow(payloads):
    time.sleep(0.05)
    return ["v2"] * len(payloads)

def broken(payloads):
    raise RuntimeError("broken")
"""
"""Code of the versions, for a file answers.py."""


def version_spec(name: str, version: str, **runtime: object) -> ServiceSpec:
    return ServiceSpec(
        name=f"{name}@{version}",
        model=ModelSpec(type="custom", handler=f"answers:{version}"),
        model_ref=version,
        runtime=Runtime.model_validate({"batch_size": 8, **runtime}),
    )


@contextmanager
def routing(
    connection: Connection, services: Mapping[str, str], v1: float, v2: float, **settings: object
) -> Iterator[str]:
    """A route of the services, by version. Its name."""
    name = f"route-{uuid.uuid4().hex[:8]}"
    record = {"name": name, "services": services, "weights": {"v1": v1, "v2": v2}, "sticky": "none", **settings}
    Routes(connection).push([RouteSpec.model_validate(record)])
    try:
        yield name
    finally:
        connection.client.unlink(*connection.client.scan_iter(f"ms:{{{name}}}:*", count=1000))
        connection.client.srem("ms:routes", name)
