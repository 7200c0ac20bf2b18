"""The setting `fair` of a service: `tenant`, or a section with weights of tenants."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.json_schema import JsonSchemaValue

from millstream.broker.config.fields import NO_LIMIT, AlsoAccepts, Count, Rate, Settings

MOST_WEIGHTS = 1_000
"""Most tenants with a weight of their own: each is a field of the service on the server."""


def _tenant(name: str) -> str:
    if not re.fullmatch("[A-Za-z0-9_.-]{1,64}", name):
        raise ValueError("a tenant has 1 to 64 of A-Z a-z 0-9 _ . -")
    return name


Tenant = Annotated[str, AfterValidator(_tenant)]


class Fair(Settings):
    """Shares the claims of each priority among the tenants that wait: `weights` of tenants, 1 for all others.

    `max_in_flight`: most jobs of one tenant that workers hold, of all priorities. None is no limit.
    """

    per: Literal["tenant"] = "tenant"
    weights: Annotated[dict[Tenant, Rate], Field(max_length=MOST_WEIGHTS)] = Field(default={})
    max_in_flight: Count | None = None


_TENANT: JsonSchemaValue = {"const": "tenant"}


def _section(value: object) -> object:
    if value in (None, "none", "null"):
        return None
    return {"per": value} if isinstance(value, str) else value


OptionalFair = Annotated[Fair | None, BeforeValidator(_section), AlsoAccepts([_TENANT, NO_LIMIT])]
