"""The setting `rate_limit` of a service: a number, or a section with limits by unit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, SerializerFunctionWrapHandler, model_serializer
from pydantic.json_schema import JsonSchemaValue

from millstream.broker.config.fields import NO_LIMIT, AlsoAccepts, Rate, Settings


class RateLimit(Settings):
    """Limits per second: `requests` (calls), `rows`, `tokens`. None is no limit.

    `burst` is the most at once, by default the limit of one second. With `per: tenant` each tenant is counted apart.
    What is beyond the limit is refused, or if `overflow` is set runs in that class, or a less urgent one of its own.
    """

    requests: Rate | None = None
    rows: Rate | None = None
    tokens: Rate | None = None
    burst: Rate | None = None
    per: Literal["tenant"] | None = None
    overflow: Literal["normal", "batch"] | None = None

    @property
    def burst_s(self) -> float:
        """Seconds of the limit that may be used at once.

        `burst` counts in the first unit that is limited: requests, rows or tokens. All units get the same seconds.
        """
        first = self.requests or self.rows or self.tokens
        return self.burst / first if self.burst and first else 1.0

    @model_serializer(mode="wrap")
    def _without_newer(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        # A newer key is left out while it has its default, so that older versions write the same record.
        fields: dict[str, object] = handler(self)
        return {name: value for name, value in fields.items() if name != "overflow" or value is not None}


_RATE: JsonSchemaValue = {"type": "number", "exclusiveMinimum": 0}


def _rates(value: object) -> object:
    if value in (None, "none", "null"):
        return None
    return {"requests": value} if isinstance(value, int | float | str) and not isinstance(value, bool) else value


OptionalRateLimit = Annotated[RateLimit | None, BeforeValidator(_rates), AlsoAccepts([_RATE, NO_LIMIT])]
