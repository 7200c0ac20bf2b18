"""The section `pools` of config.yaml: processes that host several models on one device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from millstream.broker.config.fields import Count, OptionalDuration, ServiceName, Settings, Size
from millstream.broker.config.spec import ModelSpec
from millstream.broker.config.yaml import KeyPath
from millstream.broker.contract.errors import did_you_mean


class Pool(Settings):
    """One pool. `memory` is in bytes, None for no limit. `min_residence` is in seconds, None for the default."""

    device: str
    services: tuple[ServiceName, ...]
    memory: Size | None = None
    workers: Count = 1
    min_residence: OptionalDuration = None


def check_pools(
    pools: Mapping[str, Pool], models: Mapping[str, ModelSpec | None], known: list[str]
) -> Iterator[tuple[KeyPath, str]]:
    """Yields the mistakes of pools, with their places. `models`: by service; `known`: services as they are written."""
    owners: dict[str, str] = {}
    for name, pool in pools.items():
        path: KeyPath = ("pools", name, "services")
        if not pool.services:
            yield path, "empty; name the services whose models the pool loads"
        for service in pool.services:
            model = models.get(service)
            if service not in known:
                close = did_you_mean(service, known)
                fix = f"did you mean {close}?" if close else f"known are: {', '.join(known) or 'none'}"
                yield path, f"no service named {service}; {fix}"
            elif service in owners:
                where = "twice" if owners[service] == name else f"in pool {owners[service]}, too"
                yield path, f"{service} is {where}; name it once"
            elif model and model.is_upstream:
                yield path, f"{service} runs on a server, so it has no model to load; leave it out"
            owners.setdefault(service, name)
