"""The settings of a route: versions of a service, each a service of its own, and each one's part of the calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from millstream.broker.config.canary import Canary, CanaryPlan
from millstream.broker.config.fields import AlsoAccepts, Section, ServiceName, Settings, VersionName
from millstream.broker.contract.errors import ConfigError
from millstream.broker.contract.operations import Operation

Sticky = Literal["tenant", "key", "none"]
"""Callers that keep their version: those of one tenant, those with one key, or none."""


def _weight(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _weight_alone(value: object) -> object:
    return {"weight": value} if isinstance(value, int | float | str) else value


Share = Annotated[Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)], BeforeValidator(_weight)]
Weight = Annotated[Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)], BeforeValidator(_weight)]


class Version(Settings):
    """One version: its weight relative to the others, and its service if that is not ROUTE@VERSION."""

    weight: Weight = 0.0
    service: ServiceName | None = None


class Route(Settings):
    """A route as it is written in the file. `sticky` None means the default of the versions' type."""

    versions: dict[VersionName, Annotated[Version, BeforeValidator(_weight_alone), AlsoAccepts([{"type": "number"}])]]
    sticky: Sticky | None = None
    fallback: VersionName | None = None
    fallback_across_versions: bool = False
    canary: Canary | None = None
    shadow: dict[VersionName, Share] = Field(default_factory=dict)

    def service_of(self, route: str, version: str) -> str:
        """Returns the name of a version's service."""
        return self.versions[version].service or f"{route}@{version}"

    def resolve(self, route: str, operation: Operation) -> RouteSpec:
        """Returns the route with every default filled in. `operation` is that of its versions."""
        return RouteSpec(
            name=route,
            services={version: self.service_of(route, version) for version in self.versions},
            weights={version: each.weight for version, each in self.versions.items()},
            sticky=self.sticky or ("tenant" if operation.compared else "none"),
            fallback=self.fallback,
            crosses=self.fallback_across_versions or operation.results != "vectors",
            shadow=self.shadow,
            canary=CanaryPlan(**self.canary.model_dump()) if self.canary else None,
        )


OptionalRoute = Section[Route] | None


class RouteSpec(BaseModel):
    """A route with every default filled in, as the server has it.

    `services` and `weights` are by version. `fallback` is the version that repeats calls which fail. If `crosses` is
    false, a caller never gets another version than its own. `previous` are the weights before the last change. `shadow`
    are the shares of the calls, 0 to 1, that versions get copies of. `canary` is the file's plan. `canary_run` names
    the canary whose state has the weights in effect, "" if `weights` are.
    """

    # Unknown keys are those of newer versions.
    model_config = ConfigDict(frozen=True, extra="ignore")

    name: ServiceName
    services: dict[VersionName, ServiceName] = Field(min_length=1)
    weights: dict[VersionName, Weight]
    sticky: Sticky = "none"
    fallback: VersionName | None = None
    crosses: bool = True
    previous: dict[VersionName, Weight] | None = None
    shadow: dict[VersionName, Share] = Field(default_factory=dict)
    canary: CanaryPlan | None = None
    canary_run: str = ""

    @model_validator(mode="after")
    def _names_its_versions(self) -> RouteSpec:
        named = {*self.weights, *self.shadow, *([self.fallback] if self.fallback else [])}
        if unknown := sorted(named - set(self.services)):
            raise ValueError(f"no version {', '.join(unknown)}")
        return self

    def weighted(self, weights: Mapping[str, float]) -> RouteSpec:
        """Returns a copy with other weights, which remembers those of before. No canary changes these."""
        return self.model_copy(update={"weights": dict(weights), "previous": self.weights, "canary_run": ""})

    def to_json(self) -> str:
        """Returns the record for the server."""
        return self.model_dump_json(exclude_none=True, exclude=None if self.canary_run else {"canary_run"})

    @classmethod
    def from_json(cls, text: str | bytes) -> RouteSpec:
        """Returns the route in a record. Raises ConfigError if the record cannot be read."""
        try:
            return cls.model_validate(json.loads(text))
        except (ValidationError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"a route's record in Redis cannot be read: {str(error).splitlines()[0]}",
                hint="write it again with `millstream config push --replace`",
            ) from error


def weights_problem(weights: Mapping[str, float]) -> str:
    """Returns the reason why these weights cannot be used; "" if they can."""
    return "" if any(weight > 0 for weight in weights.values()) else "one version needs a weight above 0"
