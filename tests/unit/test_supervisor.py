"""Where a supervisor's workers run, and how fast the next one follows a death."""

from __future__ import annotations

import pytest

from millstream.broker.config.load import ModelSpec, Runtime, ServiceSpec
from millstream.worker.supervision.plan import Plan
from millstream.worker.supervision.supervisor import _backoff


def plan(device: str | None = None, **model: object) -> Plan:
    echo = ModelSpec.model_validate({"type": "echo", **model})
    return Plan(ServiceSpec(name="s", model=echo, model_ref="m", runtime=Runtime()), 5, device)


@pytest.mark.parametrize(
    ("planned", "devices"),
    [
        (plan(), [None, None, None]),
        (plan(devices=["cuda:0", "cuda:1"]), ["cuda:0", "cuda:1", "cuda:0"]),
        (plan("cpu", devices=["cuda:0", "cuda:1"]), ["cpu", "cpu", "cpu"]),
    ],
)
def test_processes_take_the_models_devices_in_turn_unless_one_is_asked_for(
    planned: Plan, devices: list[str | None]
) -> None:
    assert [planned.device_of(index) for index in range(3)] == devices


def test_each_early_death_doubles_the_wait_and_the_fifth_means_a_crash_loop() -> None:
    assert [_backoff(failures) for failures in range(8)] == [0, 0.5, 1, 2, 4, 30, 30, 30]
