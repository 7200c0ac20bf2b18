"""A route gives each version its part of the callers, and a change of weights moves only the callers that it must."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import pytest

from millstream.broker.config.route import RouteSpec, Sticky
from millstream.broker.contract.errors import InvalidRequest
from millstream.client.version_choice import Caller, choose_version, rendezvous

CALLERS = 10_000


def route(weights: Mapping[str, float], sticky: Sticky = "tenant", **settings: object) -> RouteSpec:
    services = {version: f"chat@{version}" for version in weights}
    return RouteSpec.model_validate(
        {"name": "chat", "services": services, "weights": weights, "sticky": sticky, **settings}
    )


def shares(spec: RouteSpec) -> dict[str, str]:
    """The version of each of 10,000 tenants."""
    ready = set(spec.services)
    return {f"t{at}": choose_version(spec, ready, Caller(tenant=f"t{at}")) for at in range(CALLERS)}


def within(count: int, share: float) -> bool:
    """Whether `count` of all callers is within four standard deviations of a binomial distribution."""
    return abs(count - CALLERS * share) <= 4 * math.sqrt(CALLERS * share * (1 - share))


@pytest.mark.parametrize("sticky", ["tenant", "key", "none"])
def test_each_version_gets_its_share_of_ten_thousand_callers(sticky: Sticky) -> None:
    spec = route({"v1": 90, "v2": 10}, sticky)

    found = Counter(choose_version(spec, {"v1", "v2"}, Caller(f"t{at}", f"k{at}")) for at in range(CALLERS))

    assert within(found["v2"], 0.10)
    assert found.total() == CALLERS


def test_three_versions_get_their_shares() -> None:
    found = Counter(shares(route({"a": 2, "b": 1, "c": 1})).values())

    assert [within(found[version], share) for version, share in (("a", 0.5), ("b", 0.25), ("c", 0.25))] == [True] * 3


def test_from_10_to_25_percent_only_15_percent_of_the_callers_move_all_to_the_version_that_grows() -> None:
    before, after = shares(route({"v1": 90, "v2": 10})), shares(route({"v1": 75, "v2": 25}))

    moved = [tenant for tenant in before if before[tenant] != after[tenant]]

    assert within(len(moved), 0.15)
    assert {after[tenant] for tenant in moved} == {"v2"}


def test_a_caller_keeps_its_version_and_random_callers_do_not() -> None:
    sticky, key, none = (route({"v1": 1, "v2": 1}, each) for each in ("tenant", "key", "none"))
    ready = {"v1", "v2"}

    assert len({choose_version(sticky, ready, Caller("a", f"k{at}")) for at in range(100)}) == 1
    assert len({choose_version(key, ready, Caller(f"t{at}", "k")) for at in range(100)}) == 1
    assert len({choose_version(none, ready, Caller("a", "k")) for _ in range(100)}) == 2


def test_callers_of_two_routes_are_independent() -> None:
    names = [RouteSpec(name=name, services=dict.fromkeys("ab", "s"), weights={"a": 1, "b": 1}) for name in ("x", "y")]
    first, second = (shares(name.model_copy(update={"sticky": "tenant"})) for name in names)

    assert within(sum(first[tenant] == second[tenant] for tenant in first), 0.5)


def test_a_version_without_a_weight_gets_no_call_but_one_that_asks_for_it() -> None:
    spec = route({"v1": 100, "v2": 0})

    assert set(shares(spec).values()) == {"v1"}
    assert choose_version(spec, {"v1", "v2"}, Caller(version="v2")) == "v2"
    with pytest.raises(InvalidRequest, match="did you mean v2"):
        choose_version(spec, {"v1", "v2"}, Caller(version="v22"))


def test_a_version_that_is_not_ready_gets_no_calls_while_another_is() -> None:
    spec = route({"v1": 90, "v2": 10, "v3": 0}, "none", fallback="v3")

    assert {choose_version(spec, {"v2", "v3"}, Caller()) for _ in range(100)} == {"v2"}
    assert {choose_version(spec, {"v3"}, Caller()) for _ in range(100)} == {"v3"}
    assert {choose_version(spec, set(), Caller()) for _ in range(300)} == {"v1", "v2"}


def test_a_caller_whose_vectors_are_compared_keeps_its_version_though_no_worker_of_it_lives() -> None:
    spec = route({"v1": 1, "v2": 1}, crosses=False)

    for tenant in map(str, range(100)):
        assert choose_version(spec, {"v1"}, Caller(tenant)) == choose_version(spec, {"v1", "v2"}, Caller(tenant))


def test_any_text_names_a_caller() -> None:
    assert rendezvous({"v1": 1.0}, "\ud800 ä") == "v1"
