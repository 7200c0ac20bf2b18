"""A service with `fair`: tenants that wait share its claims, whatever one of them sends."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest
from bystander import Bystander
from contracts.queue import CALLER, Queue, draft, ids
from redis.typing import EncodableT, FieldT
from support import eventually
from workers import LONG_S, remove, spec, working

from millstream.broker.config.fair import Fair
from millstream.broker.config.spec import Runtime
from millstream.broker.contract.errors import QueueFull
from millstream.broker.contract.job import Priority
from millstream.broker.contract.keys import GROUP
from millstream.broker.queue import scripts
from millstream.broker.queue.claims import ClaimBudget, Claimed
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.stream_types import Group, Settlement
from millstream.broker.queue.streams import Streams
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client

Made = Callable[..., Bystander]


def tenants(claimed: Claimed) -> str:
    return "".join(claim.job.tenant if claim.job else "?" for claim in claimed.claims)


def put(queue: Queue, letters: str, priority: Priority = Priority.NORMAL) -> list[str]:
    """A job for each letter, its tenant. Returns their ids."""
    return [each.id for each in queue.put(*(draft(tenant=letter) for letter in letters), priority=priority)]


def put_by_hand(queue: Queue, tenant: str, job_id: str) -> None:
    """As redis-cli does: the job is in no index."""
    fields: dict[FieldT, EncodableT] = {"v": 1, "id": job_id, "at": 1, "op": "echo", "rows": 1, "tokens": 1}
    fields |= {"tenant": tenant, "body": '{"inputs":["x"]}'}
    queue.client.xadd(queue.keys.stream(Priority.NORMAL), fields)


def test_tenants_take_turns_and_each_of_them_in_order(bystander: Made) -> None:
    queue = bystander(fair="tenant").queue
    flood = put(queue, "aaaaaa")
    put(queue, "bb")

    claimed = queue.claim(jobs=6)

    assert tenants(claimed) == "ababaa"
    assert [job for job in ids(claimed.claims) if job in flood] == flood[:4]


def test_who_comes_later_is_served_next_and_has_nothing_to_catch_up(bystander: Made) -> None:
    queue = bystander(fair="tenant").queue
    put(queue, "aaaaaaaa")
    assert tenants(queue.claim(jobs=4)) == "aaaa"
    put(queue, "bbbb")

    assert tenants(queue.claim(jobs=3)) == "bab"


def test_who_leaves_and_comes_back_gets_no_more_than_who_stays(bystander: Made) -> None:
    """A tenant with one long job at a time has none waiting in between, and gets as many tokens as the other one."""
    queue = bystander(fair="tenant").queue
    put(queue, "a" * 20)
    taken = ""

    for _ in range(16):
        if len(taken) == 0 or taken[-1] == "b":
            queue.put(draft(tokens=15, tenant="b"))
        taken += tenants(queue.claim(jobs=1))

    assert Counter(taken) == {"a": 13, "b": 3}


def test_a_tenant_with_three_times_the_weight_gets_three_times_the_jobs(bystander: Made) -> None:
    queue = bystander(fair={"weights": {"b": 3}}).queue
    put(queue, "a" * 20 + "b" * 20)

    assert Counter(tenants(queue.claim(jobs=16))) == {"a": 4, "b": 12}


def test_a_long_job_costs_as_many_turns_as_the_short_ones_it_is_worth(bystander: Made) -> None:
    queue = bystander(fair="tenant").queue
    queue.put(*(draft(tokens=30, tenant="a") for _ in range(3)), *(draft(tokens=10, tenant="b") for _ in range(9)))

    assert tenants(queue.claim(jobs=8, tokens=10_000)) == "abbbabbb"


def test_a_more_urgent_job_comes_first_whoever_sent_it(bystander: Made) -> None:
    queue = bystander(fair="tenant").queue
    put(queue, "b")
    put(queue, "aaa", Priority.REALTIME)

    assert tenants(queue.claim()) == "aaab"


def test_a_tenant_whose_queue_is_full_refuses_itself_alone(client: Client, bystander: Made) -> None:
    service = bystander(batch_size=1, fair="tenant", max_queue_size={"jobs": 100, "per_tenant": 2})
    flood = [client.submit(service.name, [str(n)], tenant="flood") for n in range(6)]
    eventually(lambda: len(service.queue.jobs()) == 2)

    other = client.submit(service.name, ["other"], tenant="other")
    with pytest.raises(QueueFull, match=r"has 2 jobs of priority normal that wait in service .*per_tenant"):
        client.submit(service.name, ["6"], tenant="flood", wait=False).result(LONG_S)

    served = []
    while not all(handle.done() for handle in (*flood, other)):
        claims = service.queue.claim(jobs=1).claims
        served += ids(claims)
        service.answer(*claims)
    assert served[:3].count(other.id) == 1
    assert [job for job in served if job != other.id] == [handle.id for handle in flood]


def test_a_tenant_has_so_many_jobs_in_flight_and_another_one_once_one_is_settled(bystander: Made) -> None:
    service = bystander(fair={"max_in_flight": 2})
    queue = service.queue
    put(queue, "aaaaab")
    first = queue.claim()
    assert tenants(first) == "aba"
    assert tenants(queue.claim("w2")) == ""
    put(queue, "a", Priority.REALTIME)
    assert tenants(queue.claim("w2")) == ""

    service.answer(next(claim for claim in first.claims if claim.job and claim.job.tenant == "a"))

    (urgent,) = queue.claim("w2").claims
    assert urgent.address.priority == Priority.REALTIME
    assert tenants(queue.claim("w2")) == ""


def test_a_job_that_its_worker_lost_stays_in_flight_until_it_is_settled(bystander: Made) -> None:
    service = bystander(fair={"max_in_flight": 1})
    queue = service.queue
    (lost, next_one) = put(queue, "aa")
    queue.lease.beat("w1", {}, [])
    assert ids(queue.claim("w1").claims) == [lost]

    queue.lease.release("w1", gone=True)

    again = queue.claim("w2")
    assert ids(again.claims) == [lost]
    service.answer(*again.claims)
    assert ids(queue.claim("w2").claims) == [next_one]


def test_a_cancelled_job_makes_room_for_the_next_one_of_its_tenant(bystander: Made) -> None:
    queue = bystander(fair={"max_in_flight": 1}).queue
    (lost, next_one) = put(queue, "aa")
    queue.lease.beat("w1", {}, [])
    queue.claim("w1")
    assert queue.claim("w2").claims == []
    queue.lease.release("w1", gone=True)

    assert queue.streams.cancel([lost], CALLER) == ["waiting"]

    assert ids(queue.claim("w2").claims) == [next_one]


def test_a_settled_job_wakes_a_worker_for_the_next_one_of_its_tenant(bystander: Made) -> None:
    service = bystander(fair={"max_in_flight": 1})
    queue = service.queue
    (_, next_one) = put(queue, "aa")
    first = queue.claim("w1")
    for _ in range(4):
        # What rang for these two.
        queue.wait("w2")
    woken: list[Claimed] = []
    sleeper = threading.Thread(target=lambda: woken.append(queue.wait("w2", LONG_S, jobs=8)))
    sleeper.start()
    eventually(lambda: queue.client.info("clients")["blocked_clients"] > 0)

    service.answer(*first.claims)
    sleeper.join(LONG_S)

    assert ids(woken[0].claims) == [next_one]


def test_a_job_that_an_older_worker_settled_is_not_in_flight_for_ever(bystander: Made) -> None:
    queue = bystander(fair={"max_in_flight": 1}).queue
    (_, next_one) = put(queue, "aa")
    first = queue.claim("w1")
    assert queue.claim("w1").claims == []
    older = Streams(queue.client, queue.keys)
    older._fairness = ""
    assert older.settle([Settlement(claim.address, b"{}") for claim in first.claims]) == ["answered"]

    queue.client.zadd(queue.keys.parked(Priority.NORMAL), {"a": queue.now() - 60_000})

    assert ids(queue.claim("w1").claims) == [next_one]


def test_a_limit_that_was_removed_holds_nobody(bystander: Made) -> None:
    service = bystander(fair={"max_in_flight": 1})
    queue = service.queue
    put(queue, "aaa")
    assert len(queue.claim("w1").claims) == 1
    assert queue.claim("w1").claims == []

    service.push(runtime=Runtime(fair=Fair()))
    queue.client.zadd(queue.keys.parked(Priority.NORMAL), {"a": queue.now() - 60_000})

    assert tenants(queue.claim("w1")) == "aa"


def test_a_job_that_a_worker_got_past_the_index_is_not_given_out_again(bystander: Made) -> None:
    """An older worker's blocking read takes the oldest job of a stream."""
    queue = bystander(fair="tenant").queue
    (first, second) = put(queue, "ab")
    stream = queue.keys.stream(Priority.NORMAL)
    queue.client.xreadgroup(GROUP, "old", {stream: ">"}, count=1)

    claimed = queue.claim()

    assert ids(claimed.claims) == [second]
    assert queue.held_by("old") != []
    assert queue.client.zcard(queue.keys.index(Priority.NORMAL)) == 0
    assert first not in ids(queue.claim().claims)


def test_a_job_that_is_held_is_not_taken_though_the_counts_agree(bystander: Made) -> None:
    """One job too many is in the index, and one too few."""
    queue = bystander(fair="tenant").queue
    (first,) = put(queue, "a")
    stream = queue.keys.stream(Priority.NORMAL)
    queue.client.xreadgroup(GROUP, "old", {stream: ">"}, count=1)
    put_by_hand(queue, "b", "1" * 32)

    found = [job for _ in range(4) for job in ids(queue.claim().claims)]

    assert found == ["1" * 32]
    assert len(queue.held_by("old")) == 1
    assert first not in found


def test_jobs_that_were_not_indexed_are_found_in_pages_and_keep_nobody_waiting(bystander: Made) -> None:
    queue = bystander(fair="tenant").queue
    for n in range(250):
        put_by_hand(queue, "a", f"{n:032x}")
    put(queue, "b")

    first = tenants(queue.claim(jobs=2))
    rest = [tenants(queue.claim(jobs=100)) for _ in range(5)]

    assert sorted(first) == ["a", "b"]
    assert Counter("".join(rest)) == {"a": 249}
    assert queue.claim().claims == []


def test_what_is_lost_of_the_index_is_found_again(bystander: Made) -> None:
    queue = bystander(fair="tenant").queue
    waiting = put(queue, "aabb")
    queue.claim(jobs=1)
    keys = queue.keys
    queue.client.delete(keys.index(Priority.NORMAL), keys.turn(Priority.NORMAL), keys.past(Priority.NORMAL))

    found = [job for _ in range(4) for job in ids(queue.claim(jobs=1).claims)]

    assert sorted(found) == sorted(waiting[1:])


def test_turns_that_are_lost_are_made_again(bystander: Made) -> None:
    queue = bystander(fair="tenant").queue
    waiting = put(queue, "aabb")
    queue.client.delete(queue.keys.turn(Priority.NORMAL))

    found = [job for _ in range(8) for job in ids(queue.claim(jobs=1).claims)]

    assert sorted(found) == sorted(waiting)


def test_fair_may_be_set_and_removed_while_jobs_wait(connection: Connection, service: str) -> None:
    made = Bystander(connection, spec(service))
    queue = made.queue
    before = put(queue, "aab")

    made.push(runtime=Runtime(fair=Fair()))
    queue.streams.forget_fairness()
    assert tenants(queue.claim(jobs=2)) == "ab"
    fair = put(queue, "abc")
    made.push(runtime=Runtime())
    queue.streams.forget_fairness()
    after = put(queue, "d")
    found = [job for _ in range(6) for job in ids(queue.claim(jobs=2).claims)]

    assert sorted(found) == sorted([before[1], *fair, *after])
    assert not any(key.count(b":index:") for key in queue.client.scan_iter(f"ms:{{{service}}}:*"))


def test_the_plain_script_refuses_jobs_of_a_fair_service(bystander: Made) -> None:
    """A client in another language is told which script it needs."""
    service = bystander(fair="tenant")
    plain = Streams(service.queue.client, service.queue.keys)
    said: list[str] = []
    run = scripts.run

    def note(client: object, name: scripts.Name, *rest: object) -> object:
        said.append(name)
        return run(client, name, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scripts, "run", note)
        plain.enqueue([Group(Priority.NORMAL, [draft(tenant="a")])])
        plain.enqueue([Group(Priority.NORMAL, [draft(tenant="a")])])

    assert said == ["enqueue", "enqueue_fair", "enqueue_fair"]


def test_a_service_without_fair_runs_no_further_command(bystander: Made) -> None:
    service = bystander()
    queue = service.queue
    put(queue, "a")
    service.answer(*queue.claim().claims)
    commands: list[str] = []

    with queue.client.monitor() as seen:  # type: ignore[no-untyped-call]
        put(queue, "ab")
        claims = queue.claim().claims
        service.answer(claims[0])
        queue.streams.cancel([claims[1].address.job_id], CALLER)
        queue.client.echo("the end")
        while "the end" not in "".join(commands[-1:]):
            commands.append(str(seen.next_command()["command"]))

    of_tenants = (":index:", ":turn:", ":past:", ":parked:", ":in_flight", ":tenants")
    assert [command for command in commands if any(key in command for key in of_tenants)] == []
    assert [command for command in commands if command.startswith("HGET ")] == []


def test_a_new_job_wakes_a_sleeping_worker(bystander: Made) -> None:
    queue = bystander(fair="tenant").queue
    woken: list[Claimed] = []
    sleeper = threading.Thread(
        target=lambda: woken.append(queue.streams.wait("w1", LONG_S, ClaimBudget(8, 100, 1_000, empty_handed=True)))
    )
    sleeper.start()
    eventually(lambda: queue.client.info("clients")["blocked_clients"] > 0)

    began = time.monotonic()
    put(queue, "a")
    sleeper.join(LONG_S)

    assert tenants(woken[0]) == "a"
    assert time.monotonic() - began < LONG_S / 2


def test_the_oldest_jobs_that_wait_can_be_seen(connection: Connection, bystander: Made) -> None:
    service = bystander(fair="tenant")
    waiting = put(service.queue, "aaabb")
    taken = ids(service.queue.claim(jobs=2).claims)

    peek = Inspector(connection).peek(service.name, Priority.NORMAL, 2)

    assert [entry.fields["id"] for entry in peek.entries] == [job for job in waiting if job not in taken][:2]


def test_workers_serve_a_tenant_beside_a_flood(server: EmbeddedServer, client: Client, service: str) -> None:
    made = spec(service, forward_s=0.02, batch_size=8, fair="tenant", max_queue_size=10_000)
    with working(server.url, made, processes=2):
        flood = [client.submit(service, [f"flood {n}"], tenant="flood") for n in range(600)]
        eventually(lambda: flood[0].done())

        assert [client.submit(service, [str(n)], tenant="other").result(LONG_S) for n in range(5)] == [
            [str(n)] for n in range(5)
        ]

        assert not flood[-1].done()
        assert [handle.result(LONG_S) for handle in flood] == [[f"flood {n}"] for n in range(600)]
    remove(server.url, service)
