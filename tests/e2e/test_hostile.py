"""Whatever is written into the streams past our clients kills no worker, and hardly slows down those who call."""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import pytest
from e2e import hostile
from e2e.conftest import Say, Supervised
from e2e.reference import TEXTS, Reference
from e2e.sites import Site, echo, minilm
from support import eventually

from millstream.broker.contract.entry_codec import salvage
from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.broker.server.embedded import EmbeddedServer
from millstream.client import Client

pytestmark = [pytest.mark.alone, pytest.mark.timeout(240)]

WORKERS, CALLERS = 2, 4
WINDOWS, WINDOW_S = 5, 1.5
FORGERIES = 5
"""Attempts in each window under attack."""

Check = Callable[[str, object], bool]


class Honest:
    """Threads that call on, and note of each call when it began, how long it took, and what was wrong with it."""

    def __init__(self, client: Client, service: str, right: Check) -> None:
        self._client = client
        self._service = service
        self._right = right
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._call_on, args=(seed,)) for seed in range(CALLERS)]
        self.calls: list[tuple[float, float]] = []
        self.wrong: list[str] = []

    def __enter__(self) -> Honest:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def p99_ms(self, began: float, ended: float) -> float:
        """Of the calls that began meanwhile."""
        return 1000 * statistics.quantiles([took for at, took in self.calls if began <= at < ended], n=100)[98]

    def _call_on(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._over.is_set():
            text, began = chance.choice(TEXTS), time.monotonic()
            try:
                if not self._right(text, self._client.submit(self._service, [text]).result()):
                    self.wrong.append(f"a wrong answer to {text!r}")
            except Exception as error:  # noqa: BLE001 - the test reports it
                self.wrong.append(f"{type(error).__name__}: {error}")
            self.calls.append((began, time.monotonic() - began))


class Attacker:
    """Adds entries to the streams, and finds out what became of each."""

    def __init__(self, site: Site, op: str) -> None:
        self._client = site.connection.client
        self._keys = site.keys
        self._op = op
        self.sent: dict[tuple[bytes, bytes], tuple[str, str, str]] = {}
        """By priority and entry id: job id, client and detached call, each empty where it could not be answered."""
        self.forged = 0
        self.flat: dict[tuple[bytes, bytes], bytes] = {}
        """The beginning of each."""
        self._left: list[tuple[str, bytes, bytes]] = []

    def add(self, flat: Sequence[bytes]) -> None:
        priority = PRIORITIES[len(self.sent) % len(PRIORITIES)]
        stream = self._keys.stream(priority)
        # Not xadd: a dict of fields has no name twice.
        made = self._client.execute_command("XADD", stream, "*", *flat)  # type: ignore[no-untyped-call]
        self.sent[priority.value.encode(), made] = salvage(flat)
        self.flat[priority.value.encode(), made] = b" ".join(flat)[:300]
        self._left.append((stream, made, made))

    def forge(self) -> None:
        """Answer a job that is under way in its worker's place."""
        found = cast(
            list[tuple[bytes, dict[bytes, bytes]]], self._client.xrange(self._keys.stream(Priority.NORMAL), count=1)
        )
        # Only what enqueue accepted: it may be another hostile entry.
        live = [fields for _, fields in found if self._accepted(fields)]
        for fields in live:
            for flat in hostile.forged(self._op, fields):
                self.add(flat)
                self.forged += 1

    def _accepted(self, fields: dict[bytes, bytes]) -> bool:
        return bool(self._client.exists(self._keys.seen(fields.get(b"id", b"").decode("latin-1"))))

    def attack(self, entries: Sequence[Sequence[bytes]], seconds: float) -> None:
        """Spread over so long."""
        pause_s = seconds / len(entries)
        for number, flat in enumerate(entries):
            self.add(flat)
            if number % (len(entries) // FORGERIES) == 0:
                self.forge()
            threading.Event().wait(pause_s)

    def is_over(self) -> bool:
        """Whether all of them are gone from the streams."""
        while self._left and not self._client.xrange(*self._left[-1]):
            self._left.pop()
        return not self._left

    def unanswered(self) -> list[bytes]:
        """Those that are neither among the dead letters nor answered."""
        letters = cast(list[tuple[bytes, dict[bytes, bytes]]], self._client.xrange(self._keys.dead()))
        buried = {(fields[b"priority"], fields[b"entry"]) for _, fields in letters}
        return [
            self.flat[entry]
            for entry, (job, client, call) in self.sent.items()
            if entry not in buried and not (job and self._answered(job, client, call))
        ]

    def _answered(self, job: str, client: str, call: str) -> bool:
        if call and not client:
            return bool(self._client.hexists(self._keys.call(call), job))
        if not client:
            return bool(self._client.exists(self._keys.result(job)))
        replies = cast(list[tuple[bytes, dict[bytes, bytes]]], self._client.xrange(self._keys.reply(client)))
        return job.encode() in [fields[b"id"] for _, fields in replies]


def spread(op: str) -> list[list[list[bytes]]]:
    """All hostile entries in random order, one list a window.

    Of the huge ones each keeps the server busy for some 0.3 s, as it would whoever sent it: two windows have them.
    """
    entries = [*hostile.small(op), *hostile.small(op)]
    random.shuffle(entries)
    windows = [entries[number::WINDOWS] for number in range(WINDOWS)]
    for number, entry in enumerate(hostile.huge(op)):
        window = windows[number % 2]
        window.insert(random.randrange(len(window)), entry)
    return windows


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """As `millstream up` starts it: this measures, and kills no server."""
    with EmbeddedServer.start(tmp_path_factory.mktemp("server"), tcp_port=0) as running:
        yield running


@pytest.fixture(params=["echo", "embed"] if os.environ.get("MILLSTREAM_LONG") else ["echo"])
def target(request: pytest.FixtureRequest, supervised: Supervised) -> Iterator[tuple[Site, str, Check]]:
    """A service with two workers, its operation, and whether an answer is right."""
    if request.param == "echo":
        yield supervised(echo(""), WORKERS), "echo", lambda text, answer: answer == [text]
        return
    reference: Reference = request.getfixturevalue("reference")
    site = supervised(minilm(), WORKERS)
    yield site, "embed", lambda text, answer: not reference.wrong([text], cast(None, answer))


def test_hostile_entries_kill_no_worker_and_hardly_slow_down_honest_callers(
    target: tuple[Site, str, Check], say: Say
) -> None:
    site, op, right = target
    workers, attacker = site.watch.live(), Attacker(site, op)
    quiet, attacked = [], []

    with Client(site.url) as client, Honest(client, site.spec.name, right) as honest:
        eventually(lambda: len(honest.calls) > 50, within_s=60.0)
        for entries in spread(op):
            began = time.monotonic()
            threading.Event().wait(WINDOW_S)
            middle = time.monotonic()
            attacker.attack(entries, WINDOW_S)
            eventually(attacker.is_over, within_s=30.0)
            quiet.append(honest.p99_ms(began, middle))
            attacked.append(honest.p99_ms(middle, time.monotonic()))

    sent, forged = len(attacker.sent), attacker.forged
    say(f"{op}: {sent} hostile entries, {forged} of them forged; p99 of {len(honest.calls)} calls, ms:")
    say(f"  quiet    {' '.join(f'{each:6.1f}' for each in quiet)}  median {statistics.median(quiet):.1f}")
    say(f"  attacked {' '.join(f'{each:6.1f}' for each in attacked)}  median {statistics.median(attacked):.1f}")
    assert attacker.unanswered() == []
    assert honest.wrong == []
    assert site.watch.live() == workers
    assert sum(host.deaths() for host in site.hosts) == 0
    assert site.watch.depth() == 0
    assert site.watch.held() == []
    assert forged
    assert statistics.median(attacked) <= 2 * statistics.median(quiet)
