"""Plan of the worker processes to run here, and the check, before any starts, that they can."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from millstream.broker.config.load import Config, ServiceSpec
from millstream.broker.config.pools import Pool
from millstream.broker.contract.errors import ModelUnavailable
from millstream.broker.contract.operations import RUNNABLE
from millstream.worker.models.loading.source import handler_of, locate
from millstream.worker.pool.args import PoolArgs


@dataclass(frozen=True, slots=True)
class Plan:
    """Processes of a service to run here: `count` of them, each on `device` (None: the model's, or the best one).

    `folder`: searched for the code of a custom model, besides the installed packages. `beside`: other services that the
    same processes host. `pool`: their pool, whose models come and go; None if all are always in memory.
    """

    spec: ServiceSpec
    count: int
    device: str | None = None
    folder: str = ""
    beside: Sequence[ServiceSpec] = ()
    pool: PoolArgs | None = None

    @property
    def specs(self) -> Sequence[ServiceSpec]:
        """All services of these processes."""
        return (self.spec, *self.beside)

    @property
    def services(self) -> str:
        """Names of these services, for the log."""
        return " and ".join(each.name for each in self.specs)

    def device_of(self, index: int) -> str | None:
        """Device of the process number `index` of this plan: its devices in turn."""
        devices = (self.device,) if self.device else self.spec.model.devices or (self.spec.model.device,)
        return devices[index % len(devices)]


def plans_of(config: Config, folder: str) -> list[Plan]:
    """Returns the processes of a configuration: those of its pools, and of each service that is in none."""
    pooled = {service for pool in config.pools.values() for service in pool.services}
    alone = [spec for spec in config.services.values() if spec.name not in pooled]
    return [
        *(pool_plan(name, pool, config.services, folder) for name, pool in config.pools.items()),
        *(Plan(spec, spec.runtime.worker_count, folder=folder) for spec in alone),
    ]


def pool_plan(name: str, pool: Pool, specs: Mapping[str, ServiceSpec], folder: str) -> Plan:
    """Returns the processes of a pool. `specs`: its services by name, and maybe others."""
    first, *beside = [specs[service] for service in pool.services]
    args = PoolArgs(name, pool.memory, pool.min_residence)
    return Plan(first, pool.workers, pool.device, folder, beside, args)


def preflight(specs: Sequence[ServiceSpec]) -> None:
    """Checks, without torch and in milliseconds, that workers can start. Raises ModelUnavailable if not."""
    for spec in specs:
        operation = spec.model.operation
        if not operation.runs:
            raise ModelUnavailable(
                f"service {spec.name!r}: this version has no worker for models of type {spec.model.type!r}",
                hint=f"types that run today: {', '.join(RUNNABLE)}",
            )
        _check_libraries(spec)
        if operation.needs_weights:
            locate(spec.model.model_name, operation.organization)
        if operation.needs_code:
            handler_of(spec)


def _check_libraries(spec: ServiceSpec) -> None:
    missing = [name for name in spec.model.operation.libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelUnavailable(
            f"service {spec.name!r} needs {' and '.join(missing)}, not installed here",
            hint=f'pip install "millstream[{"upstream" if spec.model.is_upstream else "worker"}]"',
        )
