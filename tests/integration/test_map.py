"""Mapping over inputs of any length: in order or as they come, bounded in flight, ended early without a trace."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest
from bystander import Bystander
from support import eventually

from millstream.broker.contract.errors import InvalidRequest, MillstreamError, NoWorkers, UnknownService
from millstream.broker.contract.job import Json
from millstream.broker.server.embedded import EmbeddedServer
from millstream.client import AsyncClient, Client

T = TypeVar("T")

ROWS: list[Json] = [f"row {n} " + "x" * (n % 31) for n in range(3_000)]


class Source:
    """Gives rows one by one and counts how many were taken and not answered yet."""

    def __init__(self, rows: list[Json]) -> None:
        self._rows = rows
        self.pulled = 0
        self.yielded = 0
        self.most = 0

    def _pull(self) -> None:
        self.pulled += 1
        self.most = max(self.most, self.pulled - self.yielded)

    def __iter__(self) -> Iterator[Json]:
        for row in self._rows:
            self._pull()
            yield row

    async def __aiter__(self) -> AsyncIterator[Json]:
        for row in self._rows:
            self._pull()
            await asyncio.sleep(0)
            yield row


def of_async(server: EmbeddedServer, use: Callable[[AsyncClient], Awaitable[T]]) -> T:
    async def run() -> T:
        async with AsyncClient(server.url) as client:
            return await use(client)

    return asyncio.run(run())


# -- order and window ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 3, 5, 256, 10_000])
def test_a_map_keeps_the_order_and_its_window(client: Client, echo: str, window: int) -> None:
    source = Source(ROWS if window > 100 else ROWS[:40])
    results = []

    for result in client.map(echo, source, window=window):
        source.yielded += 1
        results.append(result)

    assert results == source._rows
    assert source.most <= window


@pytest.mark.parametrize("window", [1, 3, 256])
def test_a_map_without_order_yields_every_row_once_with_its_index(client: Client, echo: str, window: int) -> None:
    source = Source(ROWS if window > 100 else ROWS[:40])
    results = {}

    for row, result in client.map(echo, source, window=window, ordered=False):
        source.yielded += 1
        assert row not in results
        results[row] = result

    assert [results[row] for row in range(len(source._rows))] == source._rows
    assert source.most <= window


@pytest.mark.parametrize("ordered", [True, False])
def test_an_async_map_takes_an_async_generator_and_keeps_its_window(
    server: EmbeddedServer, echo: str, ordered: bool
) -> None:
    source = Source(ROWS)

    async def run(client: AsyncClient) -> list[Any]:
        results = []
        async for result in client.map(echo, source.__aiter__(), window=256, ordered=ordered):
            source.yielded += 1
            results.append(result)
        return results

    results = of_async(server, run)
    assert (results if ordered else [result for _, result in sorted(results)]) == ROWS
    assert source.most <= 256


def test_an_async_map_takes_a_plain_iterable_too(server: EmbeddedServer, echo: str) -> None:
    async def run(client: AsyncClient) -> list[object]:
        return [result async for result in client.map(echo, iter(ROWS), window=500)]

    assert of_async(server, run) == ROWS


def test_what_is_answered_first_comes_first_where_order_does_not_matter(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(batch_size=1)
    mapped = client.map(service.name, ["a", "b", "c", "d"], window=4, ordered=False)

    first = next_after(mapped, lambda: service.answer(service.claim(4)[2]))

    assert first == (2, "c")


def test_nothing_maps_to_nothing(client: Client, echo: str) -> None:
    assert list(client.map(echo, [])) == []
    assert list(client.map(echo, iter([]), ordered=False)) == []


@pytest.mark.parametrize("wrong", [{"window": 0}, {"window": -5}, {"results": "errors"}, {"priority": "soon"}])
def test_wrong_arguments_are_refused(client: Client, echo: str, wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        list(client.map(echo, ["a"], **wrong))  # type: ignore[arg-type]


def test_an_unknown_service_is_said_at_the_first_row(client: Client, echo: str) -> None:
    with pytest.raises(UnknownService):
        next(client.map(echo + "x", ["a"]))


# -- rows that fail ------------------------------------------------------------------------------------------------


def test_a_row_that_fails_raises_its_own_error_in_its_place(client: Client, echo: str) -> None:
    mapped = client.map(echo, ["a", "b", 5, "c"], window=4)

    assert [next(mapped), next(mapped)] == ["a", "b"]
    with pytest.raises(InvalidRequest):
        next(mapped)
    assert list(mapped) == []


def test_errors_can_be_had_as_results(client: Client, echo: str) -> None:
    a, bad, c = client.map(echo, ["a", 5, "c"], window=4, results="outcomes")

    assert (a, c) == ("a", "c")
    assert isinstance(bad, InvalidRequest)


def test_errors_of_an_async_map_are_raised_or_results(server: EmbeddedServer, echo: str) -> None:
    async def run(client: AsyncClient) -> list[object]:
        mapped = client.map(echo, ["a", 5, "c"])
        assert await anext(mapped) == "a"
        with pytest.raises(InvalidRequest):
            await anext(mapped)
        outcomes = client.map(echo, ["a", 5, "c"], results="outcomes", ordered=False)
        return [outcome async for _, outcome in outcomes]

    outcomes = of_async(server, run)
    assert [each if isinstance(each, str) else type(each) for each in outcomes] == ["a", InvalidRequest, "c"]


def test_a_map_whose_workers_are_gone_ends(client: Client, bystander: Callable[..., Bystander]) -> None:
    service = bystander(total_timeout=0.2)

    for ordered in (True, False):
        with pytest.raises(NoWorkers):
            list(client.map(service.name, ["a", "b"], ordered=ordered))


# -- ends ----------------------------------------------------------------------------------------------------------


def next_after(mapped: Iterator[object], act: Callable[[], object]) -> object:
    """The first result of a map whose first jobs `act` answers meanwhile."""
    acting = threading.Thread(target=act)
    acting.start()
    try:
        return next(mapped)
    finally:
        acting.join()


@pytest.mark.parametrize("ordered", [True, False])
def test_ending_a_map_early_cancels_the_rest(
    client: Client, bystander: Callable[..., Bystander], ordered: bool
) -> None:
    service = bystander(batch_size=1)
    mapped = client.map(service.name, ["a", "b", "c", "d", "e"], window=4, ordered=ordered)
    next_after(mapped, lambda: service.answer(service.claim_one()))
    eventually(lambda: service.queue.depth() == 3)

    del mapped

    eventually(lambda: service.queue.depth() == 0)


@pytest.mark.parametrize("ordered", [True, False])
def test_an_error_that_ends_a_map_cancels_the_rest_at_once(
    client: Client, bystander: Callable[..., Bystander], ordered: bool
) -> None:
    service = bystander(batch_size=1)

    with pytest.raises(MillstreamError) as caught:
        list(client.map(service.name, [5, "b", "c", "d", "e"], window=4, ordered=ordered))

    eventually(lambda: service.queue.depth() == 0)
    assert caught.traceback, "it is held here, and with it every frame"


def test_leaving_an_async_map_cancels_the_rest(server: EmbeddedServer, bystander: Callable[..., Bystander]) -> None:
    service = bystander(batch_size=1)

    async def run(client: AsyncClient) -> None:
        mapped = client.map(service.name, ["a", "b", "c", "d", "e"], window=4)
        first = asyncio.ensure_future(anext(mapped))
        service.answer(await asyncio.to_thread(service.claim_one))
        assert await first == "a"
        await mapped.aclose()
        await asyncio.to_thread(eventually, lambda: service.queue.depth() == 0)

    of_async(server, run)


def test_cancelling_the_task_of_an_async_map_cancels_its_calls(
    server: EmbeddedServer, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(batch_size=1)

    async def collect(client: AsyncClient) -> list[object]:
        return [result async for result in client.map(service.name, ["a", "b", "c"], window=4)]

    async def run(client: AsyncClient) -> None:
        task = asyncio.create_task(collect(client))
        await asyncio.to_thread(eventually, lambda: service.queue.depth() == 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(eventually, lambda: service.queue.depth() == 0)

    of_async(server, run)
