"""A bulk run has at most a quarter of its own priority's queue in flight."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.client.bulk.sending import Sending
from millstream.client.call_options import CallOptions


@pytest.mark.parametrize(("own", "most"), [(None, 25), (40, 10), (4_000, 1_000)])
def test_the_jobs_in_flight_are_a_quarter_of_the_limit_of_the_priority(own: int | None, most: int) -> None:
    fields: dict[str, Any] = {"batch_size": 1, "max_queue_size": 100}
    if own:
        fields["priorities"] = {"batch": {"max_queue_size": own}}
    runtime = Runtime.model_validate(fields)
    spec = ServiceSpec(name="s", model=ModelSpec(type="echo"), model_ref="m", runtime=runtime)
    calls = cast(Any, SimpleNamespace(check_options=lambda spec, options: 0))

    sending = Sending(calls, spec, CallOptions(priority="batch"), "run", window=100_000)

    assert sending.may_send(0, most - 1)
    assert not sending.may_send(0, most)
