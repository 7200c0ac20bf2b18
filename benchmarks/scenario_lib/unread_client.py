"""A client of many streams that reads all but some of them: unread_client.py URL SERVICE OTHER STREAMS UNREAD WORDS.

Meanwhile it makes short calls of the same service, and of the service OTHER, which answers each row with itself. It
prints a line of JSON: how streams and calls ended, and how much memory it took above its start. The streams that were
not read are read in the end: each must still give its whole text.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from millstream.broker.contract.errors import MillstreamError
from millstream.client import AsyncClient, AsyncGenerateStream

SAMPLE_S = 0.05
PAUSE_S = 0.1
"""Seconds between two short calls of one kind."""


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Short:
    """Short calls of one kind, one after another until `stop`. `call` makes one and returns whether it was right."""

    def __init__(self, call: Callable[[str], Awaitable[bool]]) -> None:
        self.ended: Counter[str] = Counter()
        self.longest_s = 0.0
        self._call = call
        self._stopped = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        self._stopped.set()
        await self._task

    async def _run(self) -> None:
        while not self._stopped.is_set():
            began = time.perf_counter()
            try:
                right = await self._call(f"call {self.ended.total()}")
                self.ended["answered" if right else "wrong answer"] += 1
            except MillstreamError as error:
                self.ended[type(error).__name__] += 1
            self.longest_s = max(self.longest_s, time.perf_counter() - began)
            await asyncio.sleep(PAUSE_S)


async def main(url: str, service: str, other: str, streams: int, unread: int, count: int) -> None:
    texts = [" ".join(f"{number}.{word}" for word in range(count)) for number in range(streams)]
    async with AsyncClient(url) as client:

        async def says(text: str) -> bool:
            return (await client.generate(text, service=service)).text == text

        async def echoes(text: str) -> bool:
            return bool(await client.call(other, text) == text)

        await says("a mill")
        await echoes("a mill")
        before = most = resident()

        async def watch() -> None:
            nonlocal most
            while True:
                await asyncio.sleep(SAMPLE_S)
                most = max(most, resident())

        watching = asyncio.create_task(watch())
        began = time.perf_counter()
        opened = [client.generate_stream(text, service=service) for text in texts]
        for stream in opened[:unread]:
            await stream.__aenter__()
        short = {"texts": Short(says), "echoes": Short(echoes)}
        others = await asyncio.gather(*map(read, opened[unread:], texts[unread:]))
        for calls in short.values():
            await calls.stop()
        seconds = time.perf_counter() - began
        late = [await read(stream, text) for stream, text in zip(opened[:unread], texts[:unread], strict=True)]
        watching.cancel()
    pieces = [number for _, number in others]
    found = {
        "read": Counter(how for how, _ in others),
        "unread": Counter(how for how, _ in late),
        "short": {kind: calls.ended for kind, calls in short.items()},
        "longest": max(calls.longest_s for calls in short.values()),
        "pieces": sorted(pieces),
        "seconds": seconds,
        "bytes": most - before,
    }
    sys.stdout.write(json.dumps(found) + "\n")


async def read(stream: AsyncGenerateStream, text: str) -> tuple[str, int]:
    """Reads a stream to its end; how it ended, and its number of pieces."""
    at = pieces = 0
    try:
        async for delta in stream:
            if not text.startswith(delta.text, at):
                return "wrong text", pieces
            at += len(delta.text)
            pieces += 1
    except MillstreamError as error:
        return type(error).__name__, pieces
    return f"finish reason {delta.finish_reason}" if at == len(text) else "incomplete", pieces


if __name__ == "__main__":
    url, service, other, *numbers = sys.argv[1:]
    asyncio.run(main(url, service, other, *map(int, numbers)))
