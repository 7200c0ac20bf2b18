"""The calls of a bulk run: like lengths together, the same calls in each process, bounded in rows, bytes and jobs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import InvalidRequest
from millstream.client.bulk import sending as module
from millstream.client.bulk.items import Mark, Row, Shard
from millstream.client.bulk.sending import Chunk, Group, Sending
from millstream.client.call_options import CallOptions


def sending_of(run: str = "run", window: int = 100_000, **runtime: Any) -> Sending:
    fields = Runtime.model_validate({"batch_size": 10, "max_queue_size": 10_000, **runtime})
    spec = ServiceSpec(name="s", model=ModelSpec(type="echo"), model_ref="m", runtime=fields)
    calls = cast(Any, SimpleNamespace(check_options=lambda spec, options: 0))
    return Sending(calls, spec, CallOptions(priority="batch"), run, window)


def shards_of(*lengths: Sequence[int]) -> list[Shard]:
    """Shards whose rows have these lengths; 0 is a row that cannot be read."""
    shards, number = list[Shard](), count()
    for at, rows in enumerate(lengths):
        begin = shards[-1].end if shards else Mark()
        values = [Row(None, "x" * length if length else InvalidRequest("no")) for length in rows]
        shards.append(Shard(begin, Mark(at + 1, begin.row + len(rows), begin.position + 1), values, f"d{next(number)}"))
    return shards


def call(jobs: int, size: int = 0) -> Chunk:
    return Chunk(
        Group([], [], [], [], 0, 0), range(jobs), size, "key", CallOptions(), cast(Any, SimpleNamespace(jobs=jobs))
    )


@pytest.mark.parametrize(("own", "most"), [(None, 25), (40, 10), (4_000, 1_000)])
def test_the_jobs_in_flight_are_a_quarter_of_the_limit_of_the_priority(own: int | None, most: int) -> None:
    own_limit: dict[str, Any] = {"priorities": {"batch": {"max_queue_size": own}}} if own else {}
    sending = sending_of(batch_size=1, max_queue_size=100, **own_limit)

    assert sending.may_send([call(most - 1)])
    assert not sending.may_send([call(most)])


def test_rows_of_all_shards_of_a_group_are_sorted_together() -> None:
    lengths = [[5, 90, 20, 0], [80, 6, 30], [7, 70, 40]]
    flat = [length for shard in lengths for length in shard]

    chunks = list(sending_of(window=12).split(shards_of(*lengths)))

    assert [[flat[at] for at in chunk.rows] for chunk in chunks] == [[90, 80, 70], [40, 30, 20], [7, 6, 5]]
    assert {id(chunk.owner) for chunk in chunks} == {id(chunks[0].owner)}
    assert (chunks[0].owner.waiting, chunks[0].owner.done, chunks[0].owner.failed) == (3, 1, 1)


def test_another_process_gives_the_same_rows_the_same_keys_and_other_rows_others() -> None:
    lengths = [[9, 5], [7, 3]]

    def keys(run: str = "run", skip: int = 0, shards: Sequence[Shard] | None = None) -> list[str]:
        return [chunk.key for chunk in sending_of(run, 8).split((shards or shards_of(*lengths))[skip:])]

    first, second = shards_of(*lengths)
    other = [keys("other"), keys(skip=1), keys(shards=[first, second._replace(digest="changed")])]
    assert keys() == keys()
    assert len({key for each in [keys(), *other] for key in each}) == len(keys()) + sum(map(len, other))


def test_a_call_has_bounded_bytes_and_so_have_all_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CALL_BYTES", 100)
    monkeypatch.setattr(module, "IN_FLIGHT_BYTES", 200)

    chunks = list(sending_of().split(shards_of([150, 60, 60, 40, 30, 30, 30, 10])))

    assert sum(chunk.size for chunk in chunks) == 410
    assert all(chunk.size <= 100 or len(chunk.rows) == 1 for chunk in chunks)
    assert all(one.size + two.size > 100 for one, two in pairwise(chunks))
    assert sending_of().may_send([call(1, 199)])
    assert not sending_of().may_send([call(1, 200)])


def test_a_group_without_a_row_to_send_is_one_call_without_rows() -> None:
    (chunk,) = sending_of().split(shards_of([0, 0], [0]))

    assert (list(chunk.rows), chunk.jobs, chunk.owner.done) == ([], 0, 3)
