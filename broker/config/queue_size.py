"""The setting `max_queue_size` of a service: a number of jobs, or a section that limits the jobs of a tenant, too."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticKnownError

from millstream.broker.config.fields import Count, Settings


class QueueSize(Settings):
    """Most jobs of each priority: `jobs` in all, those that run included, and `per_tenant` of one tenant that wait.

    `per_tenant` needs `fair`. None is no limit of its own.
    """

    jobs: Count
    per_tenant: Count | None = None

    def __str__(self) -> str:
        return str(self.jobs) if self.per_tenant is None else f"{self.jobs}, {self.per_tenant} a tenant"


_NUMBER: TypeAdapter[int] = TypeAdapter(Count)
_SECTION = TypeAdapter(QueueSize)


def _size(value: object) -> int | QueueSize:
    if isinstance(value, dict) and not value.keys() <= {"jobs", "per_tenant"}:
        raise ValueError(
            "must be a whole number, or {jobs: N, per_tenant: N} "
            "(a priority's own limit is priorities.NAME.max_queue_size)"
        )
    # Validated here: a union would report what is wrong with each of its types.
    try:
        return (_SECTION if isinstance(value, dict | QueueSize) else _NUMBER).validate_python(value)
    except ValidationError as error:
        first: Any = error.errors()[0]
        raise PydanticKnownError(first["type"], first.get("ctx")) from None


JobsOrQueueSize = Annotated[Annotated[int, Field(ge=1)] | QueueSize, BeforeValidator(_size)]
