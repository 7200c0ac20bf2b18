"""Forks with a client in hand, each time in another way: forking.py WAY URL SERVICE IDLE_SERVICE.

SERVICE echoes, nobody serves IDLE_SERVICE. Raises, and so exits with another status than 0, where anything is wrong.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from multiprocessing.context import BaseContext

from millstream import client as module
from millstream.broker.contract.errors import BrokerUnavailable
from millstream.broker.contract.job import Json
from millstream.client import Client

CHILDREN, THREADS, CALLS = 4, 4, 200
CHILD_S = 45.0
AT_ONCE_S = 1.0


def make_calls(client: Client, service: str, who: str, calls: int) -> None:
    """Each call must get its own answer."""
    for n in range(calls):
        rows: list[Json] = [f"{who} {n} {row}" for row in range(1 + n % 3)]
        answer = client.submit(service, rows).result(CHILD_S)
        assert answer == rows, (answer, rows)


def make_calls_in_threads(client: Client, service: str, who: str) -> None:
    failures: list[BaseException] = []

    def call(thread: int) -> None:
        try:
            make_calls(client, service, f"{who} thread {thread}", CALLS // THREADS)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=call, args=[n]) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def forked(act: Callable[[], None]) -> int:
    """A child that runs `act` and exits, with status 0 where it raised nothing; its pid."""
    # Its thread would be missing in the child, and waited for.
    faulthandler.cancel_dump_traceback_later()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        # A child that hangs shows where.
        faulthandler.dump_traceback_later(CHILD_S, exit=True)
        act()
        status = 0
    except BaseException:  # noqa: BLE001 - whatever it was, it must not run on in the parent's code
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def is_its_parents(use: Callable[[], object]) -> bool:
    try:
        use()
    except BrokerUnavailable as error:
        return "before a fork" in str(error)
    return False


def ended_well(pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"child: status {status}"


# -- ways ----------------------------------------------------------------------------------------------------------


def prefork(url: str, service: str, idle: str) -> None:
    """As a web server does it: a client made and used before the fork, then used on both sides."""
    client = Client(url)
    make_calls(client, service, "before", 10)
    pids = [forked(lambda n=n: make_calls_in_threads(client, service, f"child {n}")) for n in range(CHILDREN)]  # type: ignore[misc]
    make_calls_in_threads(client, service, "parent")
    for pid in pids:
        ended_well(pid)
    make_calls(client, service, "after", 10)
    assert client.stray_replies == 0


def inherited(url: str, service: str, idle: str) -> None:
    """A call and a map under way at the fork are the parent's: the child hears so at once and disturbs nothing."""
    client = Client(url)
    handle = client.submit(idle, ["a"])
    mapped = client.map(idle, ["b", 5], window=2, results="outcomes", ordered=False)
    assert next(mapped)[0] == 1

    maps = [mapped]
    del mapped

    def child() -> None:
        began = time.monotonic()
        for use in (handle.result, handle.outcomes, handle.wait, handle.done, handle.cancel):
            assert is_its_parents(use)
        assert is_its_parents(lambda: handle.ready)
        assert is_its_parents(lambda: handle.rows_done)
        assert is_its_parents(lambda: next(maps[0]))
        handle.cancel_soon()
        maps.clear()
        gc.collect()
        assert time.monotonic() - began < AT_ONCE_S
        make_calls(client, service, "child", 5)

    ended_well(forked(child))
    assert not handle.done()
    assert handle.cancel(), "the job still waits, untouched by the child"


def closing(url: str, service: str, idle: str) -> None:
    """A child that closes, or drops, what it inherited takes nothing from its parent."""
    client = Client(url)
    handle = client.submit(idle, ["a"])
    make_calls(client, service, "before", 1)
    ended_well(forked(client.close))

    def drop() -> None:
        nonlocal client
        del client
        gc.collect()

    ended_well(forked(drop))
    make_calls(client, service, "after", 20)
    assert not handle.done()


def under_load(url: str, service: str, idle: str) -> None:
    """Forks at any moment of what other threads do: whatever lock they hold, the child must not need it."""
    client = Client(url)
    over = threading.Event()
    failures: list[BaseException] = []

    def call(thread: int) -> None:
        n = 0
        try:
            while not over.is_set():
                n += 1
                make_calls(client, service, f"parent {thread} {n}", 1)
                client.submit(idle, ["unwanted"]).cancel_soon()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=call, args=[n]) for n in range(8)]
    for thread in threads:
        thread.start()
    for n in range(60):
        ended_well(forked(lambda n=n: make_calls(client, service, f"child {n}", 2)))  # type: ignore[misc]
    over.set()
    for thread in threads:
        thread.join()
    assert not failures
    # Some of a forked child's locks are found out only by a second fork.
    ended_well(forked(lambda: ended_well(forked(lambda: make_calls(client, service, "grandchild", 2)))))


def with_locks_held(url: str, service: str, idle: str) -> None:
    """What a thread of the parent held at the fork stays held in the child, for ever."""
    client = Client(url)
    make_calls(client, service, "before", 1)
    handle = client.submit(idle, ["a"])
    calls = client._calls
    pool = calls.connection.client.connection_pool
    locks: list[AbstractContextManager[object]] = [
        calls.channel._lock,
        calls.services._asker._lock,
        pool._lock,
        pool._fork_lock,
        handle._lock,
    ]
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            over.wait()

    holding = threading.Thread(target=hold)
    holding.start()
    held.wait()

    def child() -> None:
        make_calls(client, service, "child", 5)
        assert calls.services.live_workers(service) == 1
        assert is_its_parents(handle.wait)
        handle.cancel_soon()
        client.close()

    pid = forked(child)
    ended_well(pid)
    over.set()
    holding.join()
    make_calls(client, service, "after", 5)


def with_multiprocessing(url: str, service: str, idle: str) -> None:
    """The module's own client, through the contexts that fork and that start afresh."""
    make_calls(module.default(), service, "before", 2)
    for way in ("fork", "spawn", "forkserver"):
        context: BaseContext = multiprocessing.get_context(way)
        processes = [context.Process(target=use_default, args=(service, f"{way} {n}")) for n in range(2)]  # type: ignore[attr-defined]
        for process in processes:
            process.start()
        make_calls(module.default(), service, f"beside {way}", 20)
        for process in processes:
            process.join()
            assert process.exitcode == 0, f"{way}: {process.exitcode}"


def use_default(service: str, who: str) -> None:
    make_calls(module.default(), service, who, 20)


def importing_nothing(url: str, service: str, idle: str) -> None:
    """A thread that imports holds a lock which a forked child would wait for: calls must import nothing."""
    client = Client(url)
    before = set(sys.modules)
    make_calls(client, service, "first", 1)
    assert client.submit_detached(service, ["a"]).result(CHILD_S) == ["a"]
    assert list(client.map(service, ["a", "b"])) == ["a", "b"]
    assert client.submit(idle, ["a"]).cancel()
    assert set(sys.modules) == before, set(sys.modules) - before


WAYS: dict[str, Callable[[str, str, str], None]] = {
    each.__name__: each
    for each in (prefork, inherited, closing, under_load, with_locks_held, with_multiprocessing, importing_nothing)
}


if __name__ == "__main__":
    WAYS[sys.argv[1]](*sys.argv[2:])
