"""Workers that are lost leave no names behind, and whoever waits for them is told why."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from bystander import Bystander
from e2e.hosts import Host
from integration.faults import SERVICE, Mill, milling
from support import eventually
from workers import LONG_S

from millstream.broker.contract.errors import DeadlineExceeded, MillstreamError, NoWorkers
from millstream.broker.contract.keys import GROUP
from millstream.broker.queue.pause import pause
from millstream.broker.server.embedded import EmbeddedServer
from millstream.client import AsyncClient

LOST = 10


def known(mill: Mill) -> set[str]:
    """Every name that the server holds for a worker."""
    beats = cast(list[bytes], mill.connection.client.zrange(mill.queue.keys.workers(), 0, -1))
    names = set(beats)
    for stream in mill.queue.keys.streams():
        names |= {each["name"] for each in mill.connection.client.xinfo_consumers(stream, GROUP)}
    return {name.decode() for name in names}


def test_ten_lost_workers_leave_no_name_and_no_job_behind(tmp_path: Path, server_binary: Path) -> None:
    with milling(tmp_path, server_binary, forward_s=0.05, batch_size=1) as mill:
        (survivor,) = mill.watch.live()
        host = Host(mill.server.url, SERVICE, LOST, tmp_path / "host")
        try:
            eventually(lambda: len(mill.watch.live()) == LOST + 1, within_s=LONG_S)
            handles = [mill.client.submit(SERVICE, [f"{number}"]) for number in range(100)]
            eventually(lambda: len(known(mill)) > LOST and len(mill.watch.held()) > LOST)

            host.lose()

            assert [handle.result(LONG_S) for handle in handles] == [[f"{number}"] for number in range(100)]
            eventually(lambda: known(mill) - {"returned"} == {survivor}, within_s=30.0)
        finally:
            host.clean_up()


# -- who waits is told ---------------------------------------------------------------------------------------------


def dead(service: Bystander) -> None:
    service.live()
    service.queue.silence("bystander")


def busy(service: Bystander) -> None:
    service.live()


def paused(service: Bystander) -> None:
    service.live()
    pause(service.queue.client, service.queue.keys)


@pytest.mark.parametrize(
    ("because", "error", "hint"),
    [
        (dead, NoWorkers, "start one with `millstream up`"),
        (busy, DeadlineExceeded, "raise the timeout or add workers"),
        (paused, DeadlineExceeded, "millstream queue resume"),
    ],
)
def test_an_awaiting_caller_is_told_why(
    server: EmbeddedServer,
    bystander: Callable[..., Bystander],
    because: Callable[[Bystander], None],
    error: type[MillstreamError],
    hint: str,
) -> None:
    service = bystander()
    because(service)

    async def call() -> None:
        async with AsyncClient(server.url) as client:
            await (await client.submit(service.name, ["a"], timeout=0.3))

    with pytest.raises(MillstreamError) as caught:
        asyncio.run(call())

    assert type(caught.value) is error
    assert hint in (caught.value.hint or "")
