"""A process that makes load: driver.py client|raw URL SERVICE. A JSON order a line in, a JSON result a line out.

Both kinds make the same calls in the same ways, so that the product and the raw loop differ in nothing else.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice, takewhile
from typing import Literal, Protocol, Self

from corpus import SEED, mix, payloads
from measure import percentile
from reference import RawClient

from millstream.client import AsyncClient, Client, MillstreamError

How = Literal["threads", "async", "map", "open", "mix", "send", "texts"]
MOST_ROWS_A_JOB = 32
DISTINCT, MIXED = 1_000, 2_000
"""How many texts there are before they come again."""

CHUNKS = 4
"""As Client.map: a window is so many calls."""


@dataclass(frozen=True, slots=True)
class Order:
    """One run: `in_flight` calls of one text each, for `seconds`.

    "threads" has a thread a call and "async" a task a call, "map" goes through one iterator. "open" sends `rate` calls
    a second whether or not any was answered. "mix" is "async" with texts of all lengths. "send" only sends `count`
    calls; "texts" sends `texts` as one call. `service` says which way, where a process knows several.
    """

    how: How
    in_flight: int = 1
    seconds: float = 1.0
    length: int = 200
    rate: float = 0.0
    count: int = 0
    texts: Sequence[str] = ()
    service: str = ""


@dataclass(slots=True)
class Result:
    """`p50` to `p999` are ms a call; `cpu_s` is this process's CPU time during the run; `cosine`: local_model.py's."""

    calls: int
    seconds: float
    cpu_s: float
    p50: float = float("nan")
    p99: float = float("nan")
    p999: float = float("nan")
    refused: int = 0
    failed: int = 0
    cosine: float = float("nan")

    @property
    def rate(self) -> float:
        return self.calls / self.seconds


@dataclass(slots=True)
class Tally:
    """What threads or tasks of one run note, each call once: under the interpreter's lock.

    The run lasts from `begin` to the last `end`: starting and joining a thousand threads takes a while, too.
    """

    latencies: list[float] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    calls: int = 0
    began: float = 0.0
    seconds: float = 0.0
    cpu_began: float = 0.0
    cpu_s: float = 0.0

    def begin(self) -> None:
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def end(self) -> None:
        self.seconds, self.cpu_s = time.perf_counter() - self.began, time.process_time() - self.cpu_began

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Subject(Protocol):
    """The product or the raw loop, called in each way."""

    def call(self, text: str) -> object: ...
    async def acall(self, text: str) -> object: ...
    def map(self, texts: Iterator[str], window: int) -> int: ...
    def send(self, text: str) -> object: ...
    def embed(self, texts: Sequence[str]) -> object: ...


class Product:
    """The client as a program uses it."""

    def __init__(self, url: str, service: str) -> None:
        self._client, self._async, self._service = Client(url), AsyncClient(url), service

    def call(self, text: str) -> object:
        return self._client.submit(self._service, [text]).result()

    async def acall(self, text: str) -> object:
        return await (await self._async.submit(self._service, [text], wait=False))

    def map(self, texts: Iterator[str], window: int) -> int:
        return sum(1 for _ in self._client.map(self._service, texts, window=window))

    def send(self, text: str) -> object:
        return self._client.submit(self._service, [text])

    def embed(self, texts: Sequence[str]) -> object:
        return self._client.submit(self._service, texts).result()


class Raw:
    """The raw loop. Where the product's map puts several rows into a job, so does this one."""

    def __init__(self, url: str) -> None:
        self._client = RawClient(url)
        self.call = lambda text: self._client.call([text])
        self.send = lambda text: self._client.send_only([text])
        self.embed = self._client.call

    async def acall(self, text: str) -> object:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes] = loop.create_future()
        self._client.submit([text], lambda reply: loop.call_soon_threadsafe(answer.set_result, reply))
        return await answer

    def map(self, texts: Iterator[str], window: int) -> int:
        rows = max(1, min(MOST_ROWS_A_JOB, window // CHUNKS))
        room, count = threading.Semaphore(max(1, window // rows)), 0
        while job := [text for _, text in zip(range(rows), texts, strict=False)]:
            room.acquire()
            self._client.submit(job, lambda _: room.release())
            count += len(job)
        for _ in range(max(1, window // rows)):
            room.acquire()
        return count


def threads(subject: Subject, order: Order, texts: Sequence[str]) -> Tally:
    tally, gate = Tally(), threading.Barrier(order.in_flight + 1)

    def lane(start: int) -> None:
        gate.wait()
        until, at = time.perf_counter() + order.seconds, start
        while (began := time.perf_counter()) < until:
            subject.call(texts[at % len(texts)])
            tally.latencies.append(time.perf_counter() - began)
            at += order.in_flight
        tally.end()

    lanes = [threading.Thread(target=lane, args=(each,)) for each in range(order.in_flight)]
    for each in lanes:
        each.start()
    tally.begin()
    gate.wait()
    for each in lanes:
        each.join()
    return tally


async def tasks(subject: Subject, order: Order, texts: Sequence[str]) -> Tally:
    with Tally() as tally:
        until = tally.began + order.seconds

        async def lane(start: int) -> None:
            at = start
            while (began := time.perf_counter()) < until:
                await subject.acall(texts[at % len(texts)])
                tally.latencies.append(time.perf_counter() - began)
                at += order.in_flight

        await asyncio.gather(*(lane(each) for each in range(order.in_flight)))
    return tally


async def arrivals(subject: Subject, order: Order, texts: Sequence[str]) -> Tally:
    """Calls at the times of a Poisson process. A latency counts from when its call was due, not from when it was made:
    a caller that comes late because all is slow has waited, too."""
    chance, endless = random.Random(SEED), cycle(texts)
    running: set[asyncio.Task[None]] = set()

    async def one(text: str, due: float) -> None:
        try:
            await subject.acall(text)
            tally.latencies.append(time.perf_counter() - due)
        except MillstreamError as error:
            (tally.refused if error.code == "queue_full" else tally.failed).append(error.code)

    with Tally() as tally:
        due = tally.began
        while (due := due + chance.expovariate(order.rate)) < tally.began + order.seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(one(next(endless), due))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
    return tally


def mapped(subject: Subject, order: Order, texts: Sequence[str]) -> Tally:
    with Tally() as tally:
        in_time = takewhile(lambda _: time.perf_counter() < tally.began + order.seconds, cycle(texts))
        tally.calls = subject.map(in_time, order.in_flight)
    return tally


def sent(subject: Subject, order: Order, texts: Sequence[str]) -> Tally:
    with Tally(calls=order.count) as tally:
        for text in islice(cycle(texts), order.count):
            subject.send(text)
    return tally


def whole(subject: Subject, order: Order, texts: Sequence[str]) -> Tally:
    with Tally(calls=len(order.texts)) as tally:
        subject.embed(order.texts)
    return tally


def looped(run: Callable[[Subject, Order, Sequence[str]], Awaitable[Tally]]) -> Callable[..., Tally]:
    async def awaited(*arguments: object) -> Tally:
        return await run(*arguments)  # type: ignore[arg-type]

    return lambda *arguments: asyncio.run(awaited(*arguments))


WAYS: dict[How, Callable[[Subject, Order, Sequence[str]], Tally]] = {
    "threads": threads,
    "async": looped(tasks),
    "mix": looped(tasks),
    "open": looped(arrivals),
    "map": mapped,
    "send": sent,
    "texts": whole,
}


def obey(subject: Subject, order: Order) -> Result:
    texts = mix(MIXED) if order.how == "mix" else payloads(DISTINCT, order.length)
    tally = WAYS[order.how](subject, order, texts)
    ms = [1_000 * each for each in tally.latencies]
    return Result(
        calls=tally.calls or len(ms),
        seconds=tally.seconds,
        cpu_s=tally.cpu_s,
        p50=percentile(ms, 0.5),
        p99=percentile(ms, 0.99),
        p999=percentile(ms, 0.999),
        refused=len(tally.refused),
        failed=len(tally.failed),
    )


def main() -> None:
    kind, url, service = sys.argv[1:]
    subject: Subject = Raw(url) if kind == "raw" else Product(url, service)
    for line in sys.stdin:
        result = obey(subject, Order(**json.loads(line)))
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
