"""Ends with calls under way, each time in another way: leaving.py WAY URL SERVICE.

The last thing it prints is when it began to end, in seconds of the system's monotonic clock.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from millstream.client import AsyncClient, Client

THREADS = 8


def ending() -> None:
    sys.stdout.write(f"{time.monotonic()}\n")
    sys.stdout.flush()


def waiting_threads(url: str, service: str) -> None:
    """Threads that wait for answers nobody will give; returns when all do."""
    client = Client(url)
    handles = [client.submit(service, [str(n)]) for n in range(THREADS)]
    for handle in handles:
        threading.Thread(target=handle.result, daemon=True).start()
    while sum(thread.name.startswith("Thread-") for thread in threading.enumerate()) < THREADS:
        time.sleep(0.01)


def main_ends(url: str, service: str) -> None:
    waiting_threads(url, service)
    ending()


def exits(url: str, service: str) -> None:
    waiting_threads(url, service)
    ending()
    sys.exit(0)


def drops_everything(url: str, service: str) -> None:
    """A call that nobody waits for, a map half-way, a detached call; no close."""
    client = Client(url)
    client.submit(service, ["a"])
    client.submit_detached(service, ["b"])
    mapped = client.map(service, iter(["c", 5, "d"]), window=1, results="outcomes")
    threading.Thread(target=lambda: next(mapped), daemon=True).start()
    ending()


def leaves_the_loop(url: str, service: str) -> None:
    """A main coroutine that returns while its tasks await."""

    async def wait(client: AsyncClient) -> None:
        await (await client.submit(service, ["a"]))

    async def run() -> None:
        client = AsyncClient(url)
        tasks = [asyncio.create_task(wait(client)) for _ in range(THREADS)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in tasks)
        ending()

    asyncio.run(run())


def is_interrupted(url: str, service: str) -> None:
    """The main thread leaves a wait by an exception, as Ctrl-C ends it."""
    # A shell that starts the tests in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    client = Client(url)
    handle = client.submit(service, ["a"])
    main = threading.get_ident()
    threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    with suppress(KeyboardInterrupt):
        handle.result()
    ending()


WAYS: dict[str, Callable[[str, str], None]] = {
    each.__name__: each for each in (main_ends, exits, drops_everything, leaves_the_loop, is_interrupted)
}


if __name__ == "__main__":
    WAYS[sys.argv[1]](*sys.argv[2:])
