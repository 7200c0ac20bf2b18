"""A process that calls through the client: callers.py URL SERVICE BOOK SEED PACE, until end of input.

Several threads share one blocking client, a loop of coroutines one async client. PACE is seconds from one call of a
caller to its next. Prints "calling" once the server was reached.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from chaos_lib.ledger import CANCELLED, OK, Book, rows_of
from millstream.broker.config.spec import PriorityName
from millstream.broker.contract.errors import (
    BrokerUnavailable,
    Cancelled,
    DeadlineExceeded,
    MillstreamError,
    PartialFailure,
)
from millstream.client import AsyncClient, Client, Detached

THREADS, COROUTINES = 4, 6
CALLERS = THREADS + COROUTINES
AWAY_S = 0.2
PRIORITIES: tuple[PriorityName, ...] = ("realtime", "normal", "normal", "batch")
SIZES = (1, 1, 1, 1, 3, 8, 24)
TENANTS = ("", "acme", "acme", "acme", "brook")


@dataclass(frozen=True)
class Order:
    """One call to make. `patience_s` is how long its caller waits before it cancels; None: it does not."""

    call: str
    rows: list[str]
    priority: PriorityName
    patience_s: float | None
    detached: bool
    tenant: str = ""


@dataclass
class Desk:
    """Hands out the calls of one caller, and writes down what becomes of them."""

    name: str
    book: Book
    chance: Random
    made: int = field(default=0)

    def order(self) -> Order:
        self.made += 1
        call = f"{self.name}-{self.made}"
        rows = rows_of(call, self.chance.choice(SIZES))
        patience_s = self.chance.choice((0.0, 0.01, 0.1)) if self.chance.random() < 0.08 else None
        priority, detached = self.chance.choice(PRIORITIES), self.chance.random() < 0.15
        order = Order(call, rows, priority, patience_s, detached, self.chance.choice(TENANTS))
        self.book.sent(call, rows)
        return order

    def close(self, order: Order, outcome: object) -> None:
        """`outcome` is what came back: values, or an error."""
        self.book.answered(order.call, judged(order, outcome))


def judged(order: Order, outcome: object) -> str:
    """OK where it is the call's own rows; CANCELLED where that was asked for; else what is wrong."""
    if order.patience_s is not None and _cut_short(order, outcome):
        return CANCELLED
    if isinstance(outcome, Exception):
        return f"{type(outcome).__name__}: {outcome}"
    return OK if outcome == order.rows else f"wrong rows: {str(outcome)[:500]}"


def _cut_short(order: Order, outcome: object) -> bool:
    """Whether rows were cancelled, and all others are right."""
    if not isinstance(outcome, PartialFailure):
        return isinstance(outcome, Cancelled)
    expected = [None if row in outcome.errors else text for row, text in enumerate(order.rows)]
    return outcome.results == expected and all(isinstance(each, Cancelled) for each in outcome.errors.values())


class Callers:
    """The threads and coroutines of one process."""

    def __init__(self, url: str, service: str, book: Book, pace_s: float) -> None:
        self._url = url
        self._service = service
        self._book = book
        self._pace_s = pace_s
        self.client = Client(url)
        self.over = threading.Event()

    def reach(self) -> None:
        """Wait for a server: a client that never reached one raises at once, and rightly so."""
        while True:
            try:
                self.client.submit(self._service, []).result()
                return
            except BrokerUnavailable:
                time.sleep(AWAY_S)

    def in_turn(self, name: str) -> None:
        desk = Desk(name, self._book, Random(name))
        while not self.over.is_set():
            began = time.monotonic()
            self._call(desk)
            self.over.wait(self._rest(desk, began))

    async def together(self, name: str) -> None:
        async with AsyncClient(self._url) as client:
            await self._reach(client)
            await asyncio.gather(*(self._awaiting(client, f"{name}-{each}") for each in range(COROUTINES)))

    def _call(self, desk: Desk) -> None:
        order = desk.order()
        desk.close(order, self._detached(order) if order.detached else self._blocking(order))

    def _blocking(self, order: Order) -> object:
        try:
            handle = self.client.submit(self._service, order.rows, priority=order.priority, tenant=order.tenant)
            self._book.accepted(order.call, handle.id)
            if order.patience_s is not None and not handle.wait(order.patience_s):
                attempted(handle.cancel)
            return handle.result()
        except MillstreamError as error:
            return error

    def _detached(self, order: Order) -> object:
        try:
            detached = self.client.submit_detached(
                self._service, order.rows, priority=order.priority, tenant=order.tenant
            )
            self._book.accepted(order.call, detached.id)
            if order.patience_s is not None:
                self.over.wait(order.patience_s)
                attempted(detached.cancel)
            return found(detached)
        except MillstreamError as error:
            return error

    async def _reach(self, client: AsyncClient) -> None:
        while True:
            try:
                await client.submit(self._service, [])
                return
            except BrokerUnavailable:
                await asyncio.sleep(AWAY_S)

    async def _awaiting(self, client: AsyncClient, name: str) -> None:
        desk = Desk(name, self._book, Random(name))
        while not self.over.is_set():
            began = time.monotonic()
            order = desk.order()
            desk.close(order, await self._awaited(client, order))
            await asyncio.sleep(0 if self.over.is_set() else self._rest(desk, began))

    async def _awaited(self, client: AsyncClient, order: Order) -> object:
        try:
            handle = await client.submit(self._service, order.rows, priority=order.priority, tenant=order.tenant)
            self._book.accepted(order.call, handle.id)
            if order.patience_s is not None:
                await asyncio.sleep(order.patience_s)
                handle.cancel_soon()
            return await handle
        except MillstreamError as error:
            return error

    def _rest(self, desk: Desk, began: float) -> float:
        return max(0.0, desk.chance.uniform(0, 2 * self._pace_s) - (time.monotonic() - began))


def attempted(cancel: Callable[[], bool]) -> None:
    """Cancel; a server that is away may or may not have heard of it, and the outcome says so."""
    try:
        cancel()
    except (BrokerUnavailable, DeadlineExceeded):
        return


def found(detached: Detached) -> object:
    """The outcome of a detached call. Asking for it raises while the server is away, and is done again."""
    while True:
        try:
            return detached.result()
        except BrokerUnavailable:
            time.sleep(AWAY_S)


def main() -> None:
    url, service, path, name, pace_s = sys.argv[1:]
    book = Book(Path(path))
    callers = Callers(url, service, book, float(pace_s))
    callers.reach()
    sys.stdout.write("calling\n")
    sys.stdout.flush()
    threads = [threading.Thread(target=callers.in_turn, args=(f"{name}-{each}",)) for each in range(THREADS)]
    threads.append(threading.Thread(target=lambda: asyncio.run(callers.together(f"{name}-async"))))
    for thread in threads:
        thread.start()
    sys.stdin.read()
    callers.over.set()
    for thread in threads:
        thread.join()
    callers.client.close()
    book.close()


if __name__ == "__main__":
    main()
