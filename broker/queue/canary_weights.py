"""The weights that a canary gives its route. Clients read them with the route."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import cast

import redis
from pydantic import ValidationError

from millstream.broker.config.route import RouteSpec
from millstream.broker.contract.keys import ServiceKeys


def read_with_canary(client: redis.Redis, keys: ServiceKeys, record: bytes | None) -> RouteSpec | None:
    """Returns the route in `record` with the weights in effect. One round trip if it has a canary, otherwise none.

    If the canary's state is lost, the weights are those of before it. Raises ConfigError if the record cannot be read.
    """
    route = RouteSpec.from_json(record) if record else None
    if route is None or not route.canary_run:
        return route
    return _weighted(route, cast(Sequence[bytes | None], client.hmget(keys.canary(), "run", "state")))


def _weighted(route: RouteSpec, fields: Sequence[bytes | None]) -> RouteSpec:
    run, text = fields
    if run is None or text is None or run != route.canary_run.encode():
        return route
    try:
        state = json.loads(text)
        weights, before = state["weights"], state["before"]
        previous = before if weights != before else route.previous
        return RouteSpec.model_validate({**route.model_dump(), "weights": weights, "previous": previous})
    except (ValidationError, ValueError, KeyError, TypeError, RecursionError):
        return route
