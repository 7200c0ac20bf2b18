"""Each limit of a service, changed alone, does what it says. Those that test_limits.py pushes are there; worker_count,
which binds at a start, is in test_cli.py."""

from __future__ import annotations

import time

import pytest
from e2e.conftest import Supervised
from e2e.sites import Site, echo
from support import eventually

from millstream.broker.contract.errors import DeadlineExceeded, RateLimited
from millstream.client import Client

FORWARD_S = 0.4


def slow(supervised: Supervised, **runtime: object) -> Site:
    """One worker that runs one row at a time, each for FORWARD_S."""
    base = {"batch_size": 1, "batch_timeout": 0.0, "total_timeout": 20.0}
    return supervised(echo(f"sleep:{FORWARD_S}", **base | runtime), 1)


def phases(site: Site, calls: int) -> list[str]:
    """How calls end that are made at once: "" for an answer, else the phase whose time was over."""
    with Client(site.url) as client:
        handles = [client.submit(site.spec.name, [f"row {number}"]) for number in range(calls)]
        ends = []
        for handle in handles:
            try:
                handle.result()
                ends.append("")
            except DeadlineExceeded as error:
                ends.append(error.phase)
        return ends


def test_within_its_limits_every_call_is_answered_and_none_from_a_cache(supervised: Supervised) -> None:
    site = slow(supervised, queue_timeout=None, inference_timeout=10 * FORWARD_S, enable_cache=False)

    assert phases(site, 4) == [""] * 4

    with Client(site.url) as client:
        again = client.submit(site.spec.name, ["row 0"])
        assert not again.ready
        assert again.result() == ["row 0"]


def test_queue_timeout_ends_what_has_not_started(supervised: Supervised) -> None:
    site = slow(supervised, queue_timeout=FORWARD_S)

    first, *_, last = phases(site, 4)

    assert (first, last) == ("", "queue")


def test_inference_timeout_ends_what_is_too_long_in_the_model(supervised: Supervised) -> None:
    site = slow(supervised, inference_timeout=FORWARD_S / 4)
    workers = site.watch.live()

    assert phases(site, 2) == ["inference"] * 2

    assert site.watch.live() == workers
    assert site.watch.dead_letters() == []


def test_total_timeout_ends_a_callers_wait(supervised: Supervised) -> None:
    site = slow(supervised, total_timeout=FORWARD_S / 2)

    assert phases(site, 1) == ["total"]


@pytest.mark.parametrize(("rate_limit", "admitted"), [(3, 3), (None, 10)])
def test_rate_limit_turns_calls_away(supervised: Supervised, rate_limit: int | None, admitted: int) -> None:
    site = supervised(echo("", rate_limit=rate_limit and {"requests": rate_limit, "burst": rate_limit}), 1)
    passed, again, began = 0, [], time.monotonic()

    with Client(site.url) as client:
        for _ in range(10):
            try:
                client.submit(site.spec.name, ["a"], wait=False).result()
                passed += 1
            except RateLimited as error:
                again.append(error.retry_after)

    assert all(again)
    # A slow machine's ten calls may take so long that more come in.
    more = 0 if rate_limit is None else rate_limit * (time.monotonic() - began)
    assert admitted <= passed <= admitted + more


def test_enable_cache_answers_from_redis_what_was_answered_before(supervised: Supervised) -> None:
    site = slow(supervised, enable_cache=True, cache_ttl=60)
    with Client(site.url) as client:
        client.submit(site.spec.name, ["a", "b"]).result()

        again = client.submit(site.spec.name, ["b", "a"])

        assert again.ready
        assert again.result() == ["b", "a"]


def test_cache_ttl_ends_what_is_kept(supervised: Supervised) -> None:
    site = supervised(echo("", enable_cache=True, cache_ttl=0.5), 1)
    with Client(site.url) as client:

        def is_found() -> bool:
            return client.submit(site.spec.name, ["a"]).ready

        def is_kept() -> bool:
            client.submit(site.spec.name, ["a"]).result()
            return is_found()

        eventually(is_kept)
        eventually(lambda: not is_found())
