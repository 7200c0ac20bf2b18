"""A program's own function as a service: `serve` registers it, answers, drains, and gives back what it held."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import pytest
from support import eventually
from workers import LONG_S, remove

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.keys import GROUP, ServiceKeys
from millstream.broker.queue.drains import Drains
from millstream.broker.queue.inspector import Inspector, ServiceView
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

Serving = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def serving(server: EmbeddedServer, tmp_path: Path) -> Iterator[Serving]:
    """Runs a program that serves; it is killed in the end where it still runs."""
    with ExitStack() as ends:

        def start(program: str, **environment: str) -> subprocess.Popen[str]:
            file = tmp_path / "program.py"
            file.write_text(LISTENS + program)
            process = subprocess.Popen(
                [sys.executable, file],
                cwd=tmp_path,
                env={**os.environ, "MILLSTREAM_REDIS_URL": server.url, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            ends.callback(process.communicate)
            ends.callback(process.kill)
            return process

        yield start


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit status, and all that it said."""
    said, _ = process.communicate(timeout=LONG_S)
    return process.returncode, said


def state(connection: Connection, service: str) -> ServiceView:
    return Inspector(connection).services([service])[0]


def attempts(connection: Connection, service: str) -> float:
    """The most attempts that any job in hand or given back has behind it."""
    deliveries = [
        cast(int, each["times_delivered"])
        for stream in ServiceKeys(service).streams()
        for each in connection.client.xpending_range(stream, GROUP, "-", "+", 100)
    ]
    return (max(deliveries, default=1) - 1) / 2


def has_worker(connection: Connection, service: str) -> bool:
    names = Registry(connection).names()
    return service in names and bool(state(connection, service).workers)


LISTENS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""Programs that a shell runs in the background ignore it, and so does all that they start."""

PROGRAM = """
import logging, os, time
from millstream.worker import serve

logging.basicConfig(level=logging.INFO, format="%(message)s")

def work(payloads):
    for each in payloads:
        if each == "hang":
            time.sleep(3600)
        if each == "slow":
            time.sleep(0.5)
    return [[each, os.getpid()] for each in payloads]

serve(
    work,
    service=os.environ["SERVICE"],
    set_up=lambda device: print("set up on", device, flush=True),
    tear_down=lambda: print("torn down", flush=True),
    device="cpu",
    batch_size=4,
    stall_timeout=30,
)
print("went on", flush=True)
"""


def test_the_service_of_the_readme_answers(server: EmbeddedServer, connection: Connection, serving: Serving) -> None:
    (program,) = re.findall(r"^```python\n(from millstream.worker import serve\n.*?)^```$", README, re.M | re.S)
    (line,) = re.findall(r"^(client\.call\(.*?\))  # (.*)$", README, re.MULTILINE)
    process = serving(program)
    try:
        eventually(lambda: has_worker(connection, "reverse"), within_s=LONG_S)
        with Client(server.url) as client:
            answer = eval(line[0], {"client": client})

        assert repr(answer) == line[1].replace('"', "'")
        assert len(program.strip().splitlines()) <= 10
        assert state(connection, "reverse").workers[0].pid == process.pid
        process.send_signal(signal.SIGINT)
        assert ended(process) == (0, "")
    finally:
        remove(server.url, "reverse")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_it_and_the_program_goes_on(
    client: Client, connection: Connection, service: str, serving: Serving, number: signal.Signals
) -> None:
    process = serving(PROGRAM, SERVICE=service)
    eventually(lambda: has_worker(connection, service), within_s=LONG_S)
    handle = client.submit(service, ["slow", "a", "b"])
    eventually(lambda: state(connection, service).in_flight)

    process.send_signal(number)

    assert handle.result(LONG_S) == [[each, process.pid] for each in ("slow", "a", "b")]
    status, said = ended(process)
    assert (status, said.splitlines()[0]) == (0, "set up on cpu")
    assert said.splitlines()[-2:] == ["torn down", "went on"]
    assert (state(connection, service).workers, state(connection, service).in_flight) == ([], 0)
    connection.client.srem("ms:services", service)


def test_an_operator_drains_it_and_it_raises_until_it_may_start_again(
    connection: Connection, service: str, serving: Serving
) -> None:
    drains = Drains(connection.client, ServiceKeys(service))
    program = serving(PROGRAM, SERVICE=service)
    eventually(lambda: has_worker(connection, service), within_s=LONG_S)
    (worker,) = state(connection, service).workers

    drains.give([worker.host], "drain")

    status, said = ended(program)
    assert (status, said.splitlines()[-2:]) == (0, ["torn down", "went on"])
    assert not has_worker(connection, service)

    status, said = ended(serving(PROGRAM, SERVICE=service))

    assert (status, f"ServicePaused: an operator keeps {worker.host}" in said) == (1, True)
    connection.client.srem("ms:services", service)


def test_a_signal_before_it_is_ready_ends_it(connection: Connection, service: str, serving: Serving) -> None:
    set_up = 'print("set up on", device, flush=True)'
    process = serving(PROGRAM.replace(set_up, f"{set_up} or time.sleep(600)"), SERVICE=service)
    assert process.stdout
    assert process.stdout.readline() == "set up on cpu\n"

    process.terminate()

    assert ended(process) == (0, "went on\n")
    connection.client.srem("ms:services", service)


def test_what_a_killed_one_held_is_answered_by_the_next(
    client: Client, connection: Connection, service: str, serving: Serving
) -> None:
    first = serving(PROGRAM, SERVICE=service)
    eventually(lambda: has_worker(connection, service), within_s=LONG_S)
    handle = client.submit(service, ["slow"])
    eventually(lambda: state(connection, service).in_flight)
    first.kill()
    first.wait()

    second = serving(PROGRAM, SERVICE=service)

    assert handle.result(LONG_S) == [["slow", second.pid]]
    connection.client.srem("ms:services", service)


@pytest.mark.parametrize("hook", ["", "check=lambda each: work([each]), ", "cost=lambda each: work([each]) and 1, "])
def test_one_that_is_stuck_ends_and_gives_back_what_it_held(
    client: Client, connection: Connection, service: str, serving: Serving, hook: str
) -> None:
    process = serving(PROGRAM.replace("stall_timeout=30", f"{hook}stall_timeout=1"), SERVICE=service)
    eventually(lambda: has_worker(connection, service), within_s=LONG_S)

    client.submit(service, ["hang"])

    status, said = ended(process)
    assert status == 1
    assert "no progress for longer than stall_timeout: this process ends" in said
    seen = state(connection, service)
    assert (seen.in_flight, seen.returned, seen.workers) == (0, 1, [])
    assert attempts(connection, service) == 1
    connection.client.srem("ms:services", service)


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "")])
def test_a_second_signal_ends_it_at_once_and_what_it_held_is_given_back_without_an_attempt(
    client: Client, connection: Connection, service: str, serving: Serving, number: signal.Signals, ends: str
) -> None:
    process = serving(PROGRAM, SERVICE=service)
    eventually(lambda: has_worker(connection, service), within_s=LONG_S)
    client.submit(service, ["hang"])
    eventually(lambda: state(connection, service).workers[0].running)

    process.send_signal(number)
    eventually(lambda: state(connection, service).workers[0].state == "draining")
    process.send_signal(number)

    status, said = ended(process)
    assert status == (-signal.SIGTERM if number == signal.SIGTERM else -signal.SIGINT)
    assert (ends in said, "torn down" in said) == (True, True)
    assert (state(connection, service).returned, state(connection, service).workers) == (1, [])
    assert attempts(connection, service) == 0
    connection.client.srem("ms:services", service)


FORKS = PROGRAM.replace("import logging", "import logging, mill").replace(
    "return [[each, os.getpid()] for each in payloads]", "return mill.terminated(payloads)"
)


def test_a_process_that_its_function_forks_can_be_terminated_and_it_goes_on(
    client: Client, connection: Connection, service: str, serving: Serving
) -> None:
    process = serving(FORKS, SERVICE=service, PYTHONPATH=str(ROOT / "tests"))
    eventually(lambda: has_worker(connection, service), within_s=LONG_S)

    assert client.call(service, "a") == -signal.SIGTERM
    assert client.call(service, "b") == -signal.SIGTERM
    assert process.poll() is None
    connection.client.srem("ms:services", service)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("batch_size=4", "batch_sze=4"), "runtime.batch_sze: unknown key; did you mean batch_size?"),
        (("batch_size=4", "batch_size=8"), "runtime.batch_size is 4, here 8"),
        (("def work", "def other"), "NameError"),
        (("serve(\n    work", "serve(\n    5"), "is no function but int"),
        (("lambda device: print", "lambda device: 1 / 0 or print"), "cannot be set up: ZeroDivisionError"),
    ],
)
def test_what_is_wrong_is_raised(
    connection: Connection, service: str, serving: Serving, change: tuple[str, str], said: str
) -> None:
    Registry(connection).push([registered(service)])

    status, text = ended(serving(PROGRAM.replace(*change), SERVICE=service))

    assert status == 1
    assert said in text
    connection.client.srem("ms:services", service)


def test_a_service_of_another_type_is_left_alone(connection: Connection, service: str, serving: Serving) -> None:
    other = registered(service).model_copy(update={"model": ModelSpec(type="echo")})
    Registry(connection).push([other])

    status, text = ended(serving(PROGRAM, SERVICE=service))

    assert (status, "is registered with type 'echo'" in text) == (1, True)
    assert Registry(connection).read(service) == other
    connection.client.srem("ms:services", service)


def test_two_functions_do_not_answer_one_service_at_a_time(
    client: Client, connection: Connection, service: str, serving: Serving
) -> None:
    first = serving(PROGRAM, SERVICE=service)
    eventually(lambda: has_worker(connection, service), within_s=LONG_S)
    other = PROGRAM.replace("def work", "def other").replace(" work,", " other,")

    status, text = ended(serving(other, SERVICE=service))
    assert (status, "runs program.py:work, this worker has program.py:other" in text) == (1, True)
    first.terminate()
    ended(first)
    second = serving(other.replace("batch_size=4,\n    stall_timeout=30,", "replace=True,"), SERVICE=service)

    assert client.call(service, "a") == ["a", second.pid]
    assert Registry(connection).read(service) == registered(service)
    connection.client.srem("ms:services", service)


def registered(service: str) -> ServiceSpec:
    """What PROGRAM registers."""
    runtime = Runtime(batch_size=4, stall_timeout=30)
    return ServiceSpec(name=service, model=ModelSpec(type="custom"), model_ref=service, runtime=runtime)


FORESEEING = """
import os
from millstream.worker import serving

class Foreseeing(serving.CustomModel):
    foreseen = []

    def foresee(self, upcoming):
        self.upcoming = upcoming

    def forward(self, rows):
        right, self.foreseen = self.foreseen == list(rows), list(self.upcoming())
        return [right] * len(rows)

serving.CustomModel = Foreseeing
serving.serve(len, service=os.environ["SERVICE"], batch_size=2)
"""


def test_a_model_can_foresee_what_it_runs_next(
    client: Client, connection: Connection, service: str, serving: Serving
) -> None:
    serving(FORESEEING, SERVICE=service)
    eventually(lambda: has_worker(connection, service), within_s=LONG_S)

    right = client.submit(service, list(range(40))).result(LONG_S)

    # Not where a worker holds nothing more, as at the start.
    assert any(right)
