"""A priority whose queue is full refuses its own jobs alone: bulk fills `batch`, and everybody else is served."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from bystander import Bystander
from support import eventually
from workers import LONG_S

from millstream.broker.contract.errors import QueueFull
from millstream.broker.contract.job import Json, Priority
from millstream.client import Client


def waiting(service: Bystander, priority: Priority) -> list[str]:
    """Ids of the jobs of one priority in the queue, the oldest first."""
    return [fields[b"id"].decode() for _, fields in service.queue.jobs(priority)]


def test_bulk_that_fills_its_priority_refuses_only_bulk(client: Client, bystander: Callable[..., Bystander]) -> None:
    service = bystander(batch_size=1, max_queue_size=3)
    bulk = [client.submit(service.name, [str(n)], priority="batch") for n in range(3)]
    eventually(lambda: len(waiting(service, Priority.BATCH)) == 3)

    urgent = client.submit(service.name, ["now"], priority="realtime", wait=False)
    plain = client.submit(service.name, ["soon"], wait=False)
    with pytest.raises(QueueFull) as caught:
        client.submit(service.name, ["3"], priority="batch", wait=False).result(LONG_S)

    assert "is full for priority batch: max_queue_size is 3" in caught.value.message
    assert caught.value.retry_after
    service.answer(*service.claim(5))
    assert [each.result(LONG_S) for each in (urgent, plain, *bulk)] == [["now"], ["soon"], ["0"], ["1"], ["2"]]


def test_calls_that_wait_for_room_in_their_priority_enter_in_order(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(batch_size=1, max_queue_size=2)
    bulk = [client.submit(service.name, [str(n)], priority="batch") for n in range(12)]
    eventually(lambda: len(waiting(service, Priority.BATCH)) == 2)

    urgent = client.submit(service.name, ["now"], priority="realtime")
    eventually(lambda: waiting(service, Priority.REALTIME) == [urgent.id])
    entered: list[str] = []
    while len(entered) < 12:
        claims = service.queue.claim("bystander").claims
        entered += [each.address.job_id for each in claims if each.address.priority == Priority.BATCH]
        service.answer(*claims)

    assert entered == [each.id for each in bulk]


def test_a_call_larger_than_its_prioritys_own_limit_is_sent_piece_by_piece(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(batch_size=1, max_queue_size=1_000, priorities={"batch": {"max_queue_size": 8}})
    rows: list[Json] = [str(n) for n in range(20)]
    most = {Priority.BATCH: 0, Priority.NORMAL: 0}
    handles = [client.submit(service.name, rows, priority=each.value) for each in most]

    while not all(handle.done() for handle in handles):
        claims = service.queue.claim("bystander", jobs=2).claims
        most = {each: max(known, len(waiting(service, each))) for each, known in most.items()}
        service.answer(*claims)

    assert [handle.result() for handle in handles] == [rows, rows]
    assert 0 < most[Priority.BATCH] <= 2 < most[Priority.NORMAL]


def test_a_larger_own_limit_takes_bulk_beyond_that_of_the_service(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(batch_size=1, max_queue_size=2, priorities={"batch": {"max_queue_size": 40}})

    for n in range(40):
        client.submit(service.name, [str(n)], priority="batch", timeout=LONG_S)

    eventually(lambda: len(waiting(service, Priority.BATCH)) == 40)
    with pytest.raises(QueueFull, match="max_queue_size is 40"):
        client.submit(service.name, ["40"], priority="batch", wait=False).result(LONG_S)
