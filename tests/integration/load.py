"""Makes calls, many at once, and measures what memory they leave behind: load.py URL SERVICE CALLS.

Prints, as JSON, how many answers were wrong and by how many MB the process grew after a warm-up.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from pathlib import Path

from millstream.client import AsyncClient

AT_ONCE = 500
WARM_UP = 10_000


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


async def call_all(client: AsyncClient, service: str, calls: int) -> int:
    """How many of so many calls were answered wrongly."""
    numbers, wrong = iter(range(calls)), 0

    async def lane() -> None:
        nonlocal wrong
        for n in numbers:
            handle = await client.submit(service, [f"text {n}"])
            wrong += await handle != [f"text {n}"]

    await asyncio.gather(*(lane() for _ in range(AT_ONCE)))
    return wrong


async def main() -> None:
    url, service, calls = sys.argv[1:]
    async with AsyncClient(url) as client:
        await call_all(client, service, WARM_UP)
        before = resident_mb()
        wrong = await call_all(client, service, int(calls))
        json.dump({"wrong": wrong, "grown_mb": round(resident_mb() - before, 1)}, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main())
