"""The settings of a canary: how one version of a route gets more and more of the calls, and what ends that."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from millstream.broker.config.fields import Span, VersionName

MOST_STEPS = 20
"""Steps that a canary may have."""


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _rising(steps: tuple[float, ...]) -> tuple[float, ...]:
    if not steps:
        raise ValueError("a canary needs a step, as in [1, 5, 25, 100]")
    if any(after <= before for before, after in pairwise(steps)):
        raise ValueError("each step must be larger than the one before, as in [1, 5, 25, 100]")
    return steps


Step = Annotated[Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)], BeforeValidator(_number)]
Steps = Annotated[tuple[Step, ...], Field(max_length=MOST_STEPS), AfterValidator(_rising)]
ErrorRate = Annotated[Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)], BeforeValidator(_number)]
Ratio = Annotated[Annotated[float, Field(ge=1, allow_inf_nan=False)], BeforeValidator(_number)]


class CanaryPlan(BaseModel):
    """A canary as the server has it: version `to` gets the percentages `steps` of the calls, each for `every` seconds.

    `max_error_rate`: how far its share of failed rows may be above that of the other versions. `max_p99_ratio`: its
    99th percentile of the time to the answer, divided by that of the others.
    """

    # Unknown keys are those of newer versions.
    model_config = ConfigDict(frozen=True, extra="ignore")

    to: VersionName
    steps: Steps = (1, 5, 25, 100)
    every: Span = 600.0
    max_error_rate: ErrorRate = 0.01
    max_p99_ratio: Ratio = 1.3


class Canary(CanaryPlan):
    """A canary as it is written in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
