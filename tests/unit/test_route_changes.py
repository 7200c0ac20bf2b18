"""A route's weights change as an operator says, forget no version, and can be taken back."""

from __future__ import annotations

import pytest

from millstream.broker.config.route import RouteSpec
from millstream.broker.config.route_changes import promote, roll_back, set_weights
from millstream.broker.contract.errors import ConfigError, InvalidRequest

ROUTE = RouteSpec(name="chat", services={"v1": "chat", "v2": "chat@v2"}, weights={"v1": 90, "v2": 10})


def test_weights_are_set_and_taken_back() -> None:
    changed = set_weights(ROUTE, {"v1": 75, "v2": 25})

    assert (changed.weights, changed.previous) == ({"v1": 75, "v2": 25}, {"v1": 90, "v2": 10})
    assert roll_back(changed).weights == ROUTE.weights
    assert roll_back(roll_back(changed)).weights == changed.weights


def test_a_new_version_is_the_service_with_its_name() -> None:
    changed = set_weights(ROUTE, {"v1": 80, "v2": 10, "v3": 10})

    assert changed.services == {"v1": "chat", "v2": "chat@v2", "v3": "chat@v3"}
    assert roll_back(changed).weights == {"v1": 90, "v2": 10, "v3": 0}


def test_all_calls_go_to_a_promoted_version() -> None:
    assert promote(ROUTE, "v2").weights == {"v1": 0, "v2": 100}
    assert set_weights(promote(ROUTE, "v2"), {"v2": 1}).weights == {"v1": 0, "v2": 1}


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"v2": 25}, "name them too: v1=90"), ({"v1": 0, "v2": 0}, "needs a weight above 0")],
)
def test_a_forgotten_version_and_a_route_without_weights_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        set_weights(ROUTE, weights)


def test_an_unknown_version_and_a_route_that_never_changed_are_told() -> None:
    with pytest.raises(InvalidRequest, match="did you mean v2"):
        promote(ROUTE, "v22")
    with pytest.raises(InvalidRequest, match="no earlier weights"):
        roll_back(ROUTE)


@pytest.mark.parametrize(
    "record", [b"", b"[]", b'{"name": "a"}', b'{"name":"a","services":{"x":"s"},"weights":{"y":1}}']
)
def test_a_record_that_cannot_be_read_says_how_to_write_it_again(record: bytes) -> None:
    with pytest.raises(ConfigError, match="config push --replace"):
        RouteSpec.from_json(record)


def test_keys_of_newer_versions_are_passed_over() -> None:
    text = ROUTE.to_json()[:-1] + ',"mirror":{"to":"v2"}}'

    assert RouteSpec.from_json(text) == ROUTE
