"""What the faults happen to: a server, hosts with workers, processes that call, and a proxy before each side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from e2e.hosts import WORKER_RUN, Host
from e2e.ledger import Ledger
from e2e.sites import echo
from e2e.watch import Watch
from support import eventually

from chaos_lib import TESTS, callers, grounds, hasty, raw_callers
from chaos_lib.grounds import Ground, Lone, Shape
from chaos_lib.ledger import Account, read
from chaos_lib.ordered import OrderedEnd
from millstream.broker.contract.errors import ConfigError
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.registry import Registry
from millstream.broker.server.datadir import AppendFsync
from millstream.broker.transport.cluster import masters
from millstream.broker.transport.connection import Connection, retrying

POISON = "poison"
FORWARD_S = 0.02
HOSTS = (WORKER_RUN, hasty.PROGRAM)
"""The program of each host: the second one kills its workers when it is told to stop."""

WORKERS_A_HOST = 2
WORKERS = len(HOSTS) * WORKERS_A_HOST
MAX_ATTEMPTS = 3
FAIR = {"weights": {"brook": 2}, "max_in_flight": 12}
"""Of 32 jobs that the workers run at once, one tenant has 12 at most."""

TOTAL_TIMEOUT_S = 300.0
"""Far beyond any outage here: a call that ends by its time was forgotten."""

KEEP_S = 0.5
START_S = 60.0
FINISH_S = 45.0

_PATH = os.pathsep.join([str(TESTS.parent / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])])
PROGRAMS = {"client": (callers, callers.CALLERS), "raw": (raw_callers, raw_callers.THREADS)}
KINDS = ("client", "client", "client", "raw", "raw")
CALLERS = sum(PROGRAMS[kind][1] for kind in KINDS)


@dataclass(eq=False)
class Calling:
    """One process of callers. `book` is its file."""

    kind: str
    process: subprocess.Popen[str]
    book: Path
    killed: bool = False

    def begin(self) -> None:
        """Wait until its first call was answered."""
        assert_said(self.process)

    def under_way(self) -> int:
        """Calls sent and not answered."""
        return len(self.account().unanswered)

    def account(self) -> Account:
        return read(self.book, killed=self.killed)

    def kill(self) -> None:
        self.killed = True
        self.process.kill()
        self.process.wait()


def assert_said(process: subprocess.Popen[str]) -> None:
    """Raises ConfigError where the process ended before it called."""
    if not process.stdout or process.stdout.readline() != "calling\n":
        raise ConfigError("a process of callers did not start", hint="see its stderr file")


class Site:
    """All processes of one run. Thread-safe where lanes share it: hosts, clients and the pids in use have a lock."""

    def __init__(self, home: Path, ground: Ground, pace_s: float, ends: ExitStack, *, fair: bool = False) -> None:
        self.home = home
        self.lock = threading.RLock()
        self.spec = echo(
            f"sleep:{FORWARD_S},crash:{POISON}",
            batch_size=8,
            max_attempts=MAX_ATTEMPTS,
            total_timeout=TOTAL_TIMEOUT_S,
            **({"fair": FAIR} if fair else {}),
        ).model_copy(update={"replicated": ground.replicated})
        self.keys = ServiceKeys(self.spec.name)
        self.hosts: list[Host] = []
        self.calling: list[Calling] = []
        self.over: list[Calling] = []
        self.taken: set[int] = set()
        self.problems: list[str] = []
        self.ordered: list[OrderedEnd] = []
        self._pace_s = pace_s
        self._ends = ends
        self.ground = ground
        self._register()
        self._poisoner = ends.enter_context(self._ledger())
        ends.enter_context(self._hosts_kept())

    def _register(self) -> None:
        # Past the proxies: what looks must not be what is looked at.
        self.connection = Connection(self.ground.url, name="chaos")
        self._ends.callback(self.connection.close)
        self.watch = Watch(self.connection, self.keys)
        Registry(self.connection).push([self.spec])
        self.keep_history()

    @contextmanager
    def _ledger(self) -> Iterator[Ledger]:
        connection = Connection(self.ground.clients_url, name="chaos-poison")
        ledger = Ledger(connection, self.keys, "echo", replicated=self.ground.replicated)
        try:
            yield ledger
        finally:
            ledger.close()
            connection.close()

    def keep_history(self) -> None:
        """Never rewrite the append-only file: it is read as the history of all jobs."""
        if isinstance(self.ground, Lone):
            retrying(lambda: self.connection.client.config_set("auto-aof-rewrite-percentage", 0))

    # -- hosts -------------------------------------------------------------------------------------------------

    def start_host(self, program: Sequence[str]) -> Host:
        with self.lock:
            home = self.home / f"host-{len(self._homes())}"
            host = Host(self.ground.workers_url, self.spec.name, WORKERS_A_HOST, home, program=program)
            self.hosts.append(host)
        self._ends.callback(host.clean_up)
        return host

    @contextmanager
    def _hosts_kept(self) -> Iterator[None]:
        """Start again each supervisor that ends by itself, as an init system does: one that meets no server says so."""
        over = threading.Event()
        keeper = threading.Thread(target=self._keep_hosts, args=(over,), name="init", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            over.set()
            keeper.join()

    def _keep_hosts(self, over: threading.Event) -> None:
        while not over.wait(KEEP_S):
            with self.lock:
                for host in [host for host in self.hosts if host.process.poll() is not None]:
                    self.hosts.remove(host)
                    self.start_host(host.program)

    def _homes(self) -> list[Path]:
        return sorted(self.home.glob("host-*"))

    def await_workers(self, within_s: float = START_S) -> None:
        eventually(lambda: len(self.watch.live()) == WORKERS, within_s=within_s)

    def deaths(self) -> int:
        """Workers that died instead of draining, as the supervisors say."""
        logs = [path.read_text(errors="replace") for path in self.home.glob("host-*/stderr")]
        return sum(log.count(" was killed by ") + log.count(" exited with status ") for log in logs)

    # -- clients -----------------------------------------------------------------------------------------------

    def start_callers(self, kind: str) -> Calling:
        """One more process of callers, that has not called yet."""
        with self.lock:
            name = f"{kind}{len(self.calling) + len(self.over)}"
            book = self.home / f"{name}.jsonl"
            book.touch()
            command = [sys.executable, "-m", PROGRAMS[kind][0].__name__]
            command += [self.ground.clients_url, self.spec.name, str(book), name, str(self._pace_s)]
            with (self.home / f"{name}.stderr").open("wb") as sink:
                process = subprocess.Popen(
                    command,
                    cwd=self.home,
                    env={**os.environ, "PYTHONPATH": _PATH},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=sink,
                    text=True,
                )
            calling = Calling(kind, process, book)
            self.calling.append(calling)
        self._ends.callback(_end, process)
        return calling

    def bury(self, calling: Calling) -> None:
        """It was killed."""
        with self.lock:
            self.calling.remove(calling)
            self.over.append(calling)

    def finish_calls(self) -> None:
        """Every process ends its calls under way; one that cannot is killed, and its account shows what is missing."""
        for calling in self.calling:
            if calling.process.stdin:
                calling.process.stdin.close()
        until = time.monotonic() + FINISH_S
        for calling in list(self.calling):
            with suppress(subprocess.TimeoutExpired):
                calling.process.wait(max(0.1, until - time.monotonic()))
            _end(calling.process)
            self.over.append(calling)
            self.calling.remove(calling)

    def complaints(self) -> dict[str, str]:
        """What processes of callers said on stderr, the last lines each."""
        files = {path.stem: path.read_text(errors="replace").strip() for path in self.home.glob("*.stderr")}
        return {name: text[-2000:] for name, text in files.items() if text}

    # -- poison ------------------------------------------------------------------------------------------------

    def send_poison(self) -> str:
        (job,) = self._poisoner.send([[f"{POISON} in the corn"]])
        return job

    def poison_replies(self) -> Mapping[str, int]:
        """Each poison job sent, and how many replies it had."""
        return {job: len(self._poisoner.replies.get(job, ())) for job in self._poisoner.sent}

    # -- the server --------------------------------------------------------------------------------------------

    def now_ms(self) -> int:
        seconds, micros = retrying(self.connection.client.time)
        return int(seconds) * 1000 + int(micros) // 1000

    def ended_jobs(self) -> int:
        """Jobs that came and are gone from the streams."""
        return retrying(self._ended)

    def _ended(self) -> int:
        infos = [self.connection.client.xinfo_stream(stream) for stream in self.keys.streams()]
        return sum(cast(int, info["entries-added"]) - cast(int, info["length"]) for info in infos)

    def immortal_keys(self) -> list[str]:
        """Keys without a ttl, of whatever service."""
        keys = [key.decode() for node in masters(self.connection.client) for key in node.scan_iter(count=1000)]
        return sorted(key for key in keys if self.connection.client.ttl(key) == -1)

    def consumers(self) -> set[str]:
        """Every consumer of any of the groups."""
        return {
            info["name"].decode()
            for stream in self.keys.streams()
            for info in self.connection.client.xinfo_consumers(stream, "workers")
        }

    # -- healing -----------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """Nothing is stopped, down, swallowed or slowed any more."""
        self.ground.heal()
        self.keep_history()
        for pid in [pid for host in self.hosts for pid in host.children]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


@contextmanager
def opened(home: Path, shape: Shape, fsync: AppendFsync, pace_s: float, *, fair: bool = False) -> Iterator[Site]:
    """A site at work: all workers live, all callers call. Every process it started is ended afterwards."""
    with ExitStack() as ends:
        site = Site(home, grounds.opened(home, shape, fsync, ends), pace_s, ends, fair=fair)
        for program in HOSTS:
            site.start_host(program)
        site.await_workers()
        for calling in [site.start_callers(kind) for kind in KINDS]:
            calling.begin()
        try:
            yield site
        finally:
            # What is frozen or down cannot be ended well.
            site.heal()
