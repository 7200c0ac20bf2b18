"""A client that opens many streams at once and reads all but some: unread_client.py URL SERVICE STREAMS UNREAD WORDS.

It prints a line of JSON: how streams ended, and how much memory it took above its start. The streams that were not read
are read in the end: each must still give its whole text.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

from millstream.broker.contract.errors import MillstreamError
from millstream.client import AsyncClient, AsyncGenerateStream

SAMPLE_S = 0.05


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def main(url: str, service: str, streams: int, unread: int, count: int) -> None:
    texts = [" ".join(f"{number}.{word}" for word in range(count)) for number in range(streams)]
    async with AsyncClient(url) as client:
        await client.generate("a mill", service=service)
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
        others = await asyncio.gather(*map(read, opened[unread:], texts[unread:]))
        seconds = time.perf_counter() - began
        late = [await read(stream, text) for stream, text in zip(opened[:unread], texts[:unread], strict=True)]
        watching.cancel()
    pieces = [number for _, number in others]
    found = {
        "read": Counter(how for how, _ in others),
        "unread": Counter(how for how, _ in late),
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
    url, service, *numbers = sys.argv[1:]
    asyncio.run(main(url, service, *map(int, numbers)))
