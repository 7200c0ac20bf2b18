"""A shadow gets its share of the calls, never of its own, and none beside a canary."""

from __future__ import annotations

from collections import Counter

from millstream.broker.config.route import RouteSpec
from millstream.client.version_choice import choose_shadow

ROUTE = RouteSpec(
    name="r", services={"v1": "a", "v2": "b", "v3": "c"}, weights={"v1": 1}, shadow={"v2": 0.25, "v3": 0.5}
)
READY = {"v1", "v2", "v3"}


def test_each_version_gets_its_share() -> None:
    found = Counter(choose_shadow(ROUTE, READY, "v1", step / 100) for step in range(100))

    assert found == {"v2": 25, "v3": 50, "": 25}


def test_no_copy_goes_to_the_version_of_the_call_or_to_one_without_workers() -> None:
    assert choose_shadow(ROUTE, READY, "v2", 0.1) == ""
    assert choose_shadow(ROUTE, {"v1"}, "v1", 0.1) == ""


def test_beside_a_canary_there_is_none() -> None:
    assert choose_shadow(ROUTE.model_copy(update={"canary_run": "x"}), READY, "v1", 0.1) == ""
