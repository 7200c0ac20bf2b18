"""Each role's user does all of its work, with the rules that `millstream acl` prints for this server, and no other."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import redis
from click.testing import CliRunner
from contracts.queue import Queue, draft
from gateways import gateway
from receivers import SECRET, Receiver, receiving
from support import eventually
from workers import LONG_S, remove, spec

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.config.webhooks import WebhookSettings
from millstream.broker.contract.errors import BrokerUnavailable, Cancelled, UnknownService, WorkerLost
from millstream.broker.contract.job import Priority
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue import scripts
from millstream.broker.queue.look import look
from millstream.broker.queue.metrics import Metrics
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.stream_types import Group
from millstream.broker.queue.webhooks import Webhooks
from millstream.broker.roles import ROLES, SELECTORS_SINCE, Role
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection, is_transient, translated
from millstream.cli.main import main
from millstream.client import Client
from millstream.gateway.dashboard.looks import see
from millstream.worker.supervision.plan import Plan
from millstream.worker.supervision.supervisor import Supervisor
from millstream.worker.supervision.webhook_sender import sending

Enter = Callable[..., str]
CONFIG = """\
models: {{m: {{type: echo, model_name: "{model}"}}}}
services: {{{service}: {{model: m, runtime: {{batch_size: {rows}}}}}}}
"""


def millstream(*words: str) -> str:
    """What the command prints; it succeeds."""
    done = CliRunner().invoke(main, list(words))
    assert done.exit_code == 0, done.output
    return done.stdout


def rules(url: str, role: Role, *words: str) -> list[str]:
    return millstream("acl", "--role", role, "--url", url, "--prefix", "ms", *words).split()


@pytest.fixture
def enter(server: EmbeddedServer, connection: Connection) -> Iterator[Enter]:
    """The URL of a new user of a role, for all services or for those named."""
    users: list[str] = []

    def login(role: Role, *services: str) -> str:
        users.append(f"{role}-{uuid.uuid4().hex[:8]}")
        named = [word for service in services for word in ("--service", service)]
        words = rules(server.url, role, "--user", users[-1], "--nopass", *named)
        assert connection.client.execute_command(*words) == b"OK"  # type: ignore[no-untyped-call]
        return f"{server.url}?username={users[-1]}&password=any"

    yield login
    for user in users:
        connection.client.acl_deluser(user)


@pytest.fixture
def echo_spec(server: EmbeddedServer) -> Iterator[ServiceSpec]:
    """A job whose text is `die` ends its worker."""
    made = spec(f"test-{uuid.uuid4().hex[:8]}", max_attempts=1).model_copy(update={"result_ttl": 30.0})
    made = made.model_copy(update={"model": made.model.model_copy(update={"model_name": "crash:die,sleep:0.2"})})
    push(server.url, made)
    yield made
    remove(server.url, made.name)


@contextmanager
def opened(url: str) -> Iterator[Connection]:
    connection = Connection(url, name="tests")
    try:
        yield connection
    finally:
        connection.close()


@contextmanager
def at_work(url: str, service: ServiceSpec) -> Iterator[Supervisor]:
    """A worker process of `service`, which is registered already, for the user of `url`."""
    supervisor = Supervisor(url, "ms", [Plan(service, 1)], drain_s=10.0)
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    try:
        eventually(lambda: supervisor.ready, within_s=LONG_S)
        yield supervisor
    finally:
        supervisor.stop()
        thread.join(LONG_S)


def push(url: str, *specs: ServiceSpec) -> None:
    with opened(url) as connection:
        Registry(connection).push(specs)


def refused(url: str, action: Callable[[Connection], object]) -> BrokerUnavailable:
    """How the user of `url` is refused."""
    with opened(url) as connection:
        with pytest.raises(BrokerUnavailable, match="refuses this user") as caught, translated(connection.safe_url):
            action(connection)
        assert not is_transient(caught.value)
    return caught.value


def queue_of(connection: Connection, service: str) -> Queue:
    return Queue(connection.client, ServiceKeys(service))


# -- what a role does ----------------------------------------------------------------------------------------------


def test_clients_and_workers_do_all_their_work_as_users_of_these_roles(enter: Enter, echo_spec: ServiceSpec) -> None:
    name = echo_spec.name

    with at_work(enter("worker", name), echo_spec) as supervisor, Client(enter("client", name)) as client:
        assert client.submit(name, ["a", "b"], tenant="ann").result(timeout=LONG_S) == ["a", "b"]
        assert list(client.map(name, ["c", "d"])) == ["c", "d"]
        detached = client.submit_detached(name, ["e"])
        assert client.job(detached.id).result(timeout=LONG_S) == ["e"]
        detached.forget()
        held = [client.submit(name, [text]) for text in ("f", "g", "h")]
        for handle in held:
            handle.cancel()
        for handle in held:
            with pytest.raises(Cancelled):
                handle.result(timeout=LONG_S)
        with pytest.raises(WorkerLost):
            client.submit(name, ["die"]).result(timeout=LONG_S)
        eventually(lambda: supervisor.restarts == 1 and supervisor.ready, within_s=LONG_S)
        assert client.submit(name, ["alive"]).result(timeout=LONG_S) == ["alive"]

        # The permissions to count are checked here: without them nothing fails, and nothing is counted.
        with opened(enter("client", name)) as limited:
            totals = Metrics(limited).read(name)
            assert totals.ok + sum(totals.failed.values()) == sum(totals.rows.values()) == 10
            assert totals.settled == sum(totals.jobs.values())
    with opened(enter("viewer", name)) as limited:
        assert Metrics(limited).read(name).work["rows"] >= 6


def test_a_client_finds_what_a_worker_kept(enter: Enter, connection: Connection, echo_spec: ServiceSpec) -> None:
    caching = echo_spec.model_copy(update={"runtime": echo_spec.runtime.model_copy(update={"enable_cache": True})})
    Registry(connection).push([caching], replace=True)

    with at_work(enter("worker", caching.name), caching), Client(enter("client", caching.name)) as client:
        assert client.submit(caching.name, ["a"]).result(timeout=LONG_S) == ["a"]
        again = client.submit(caching.name, ["a"])
        assert again.ready
        assert again.result() == ["a"]


def test_a_worker_takes_over_what_a_lost_host_held(enter: Enter, connection: Connection, service: str) -> None:
    queue = queue_of(connection, service)
    queue.open()

    with opened(enter("worker", service)) as limited:
        held = queue_of(limited, service)
        (claim,) = queue.hold("lost", draft())
        connection.client.zadd(queue.keys.workers(), {"lost": 1})
        connection.client.xclaim(
            queue.keys.stream(Priority.NORMAL), "workers", "lost", 0, [claim.address.entry], idle=60_000, justid=True
        )
        connection.client.set(queue.keys.reclaim(), f"{server_ms(connection) - 1000}:0", px=60_000)

        assert held.lease.reclaim() == 1
        assert [each.attempts for each in held.claim("w2").claims] == [0.5]


def test_a_worker_of_a_pool_looks_at_what_waits_and_stands_by(
    enter: Enter, connection: Connection, service: str
) -> None:
    queue = queue_of(connection, service)
    queue.open()
    queue.put(draft())

    with opened(enter("worker", service)) as limited:
        worker = queue_of(limited, service)

        assert look(limited.client, worker.keys).streams[Priority.NORMAL].jobs == 1
        assert worker.lease.beat("w1", {"resident": 0}, []).ready_workers == 0
        assert worker.lease.beat("w1", {"resident": 1}, []).ready_workers == 1
        worker.lease.ring()


def server_ms(connection: Connection) -> int:
    seconds, micros = connection.client.time()
    return int(seconds) * 1000 + int(micros) // 1000


def test_a_client_cancels_what_was_given_back(enter: Enter, connection: Connection, service: str) -> None:
    queue = queue_of(connection, service)
    queue.open()
    (claim,) = queue.hold("w1", draft())
    queue.lease.release("w1", gone=True)

    with opened(enter("client", service)) as limited:
        assert queue_of(limited, service).streams.cancel([claim.address.job_id], "caller") == ["waiting"]

    assert queue.depth() == 0
    assert queue.claim("w2").claims == []


def test_webhooks_are_sent_by_a_user_of_workers_also_for_what_a_client_cancelled(
    enter: Enter, connection: Connection, echo_spec: ServiceSpec, tmp_path: Path
) -> None:
    name, file = echo_spec.name, tmp_path / "secret"
    file.write_text(SECRET)
    with receiving(Receiver()) as receiver, Client(enter("client", name)) as client:
        settings = WebhookSettings(allow=(receiver.url(""),), secret_file=file)
        Registry(connection).push([echo_spec.model_copy(update={"webhooks": settings.allow})], replace=True)
        detached = client.submit_detached(name, ["a"], webhook=receiver.url())
        assert detached.cancel()

        with sending(enter("worker", name), "ms", [name], settings):
            eventually(lambda: receiver.requests)
            with opened(enter("viewer", name)) as limited:
                eventually(lambda: Webhooks(limited.client, ServiceKeys(name)).read_state(detached.id[-32:]))
                eventually(lambda: Metrics(connection).read(name).webhooks == {"delivered": 1})

    assert [(outcome.id, outcome.state) for outcome in receiver.outcomes] == [(detached.id, "failed")]


def test_a_client_reads_the_text_of_a_running_job(enter: Enter, connection: Connection, service: str) -> None:
    queue = queue_of(connection, service)
    connection.client.set(queue.keys.partial("job"), b"records", px=60_000)

    with opened(enter("client", service)) as limited:
        streams = queue_of(limited, service).streams
        assert (streams.partials(["job"]), streams.partial_behind("job", 3)) == ([b"records"], b"ords")


def test_a_viewer_sees_everything(enter: Enter, connection: Connection, echo_spec: ServiceSpec) -> None:
    name = echo_spec.name
    queue = queue_of(connection, name)
    queue.put(draft())
    queue.put_raw({b"v": b"9"})
    letter = connection.client.xadd(
        queue.keys.dead(), {"reason": "malformed", "entry": "1-1", "buried": "1", "priority": "normal"}
    )
    queue.lease.beat("somebody", {"host": "here"}, [])
    job = draft()
    queue.put(job)
    look = ("--url", enter("viewer"), "--prefix", "ms")

    assert name in millstream("queue", "ls", *look)
    assert name in millstream("queue", "show", name, *look)
    assert "a b c" in millstream("queue", "peek", name, *look)
    assert "somebody" in millstream("worker", "ls", *look)
    assert "waiting, 2 jobs before it" in millstream("job", "show", job.id, *look)
    assert name in millstream("top", name, "--interval", "1ms", *look)
    assert "malformed" in millstream("dead", "ls", name, *look)
    assert "malformed" in millstream("dead", "show", name, _text(letter), *look)
    with opened(look[1]) as limited:
        assert see(limited, "ms").found.view(name), "what the dashboard reads"


def test_a_gateway_calls_and_looks(enter: Enter, echo_spec: ServiceSpec) -> None:
    name = echo_spec.name

    with at_work(enter("worker", name), echo_spec), gateway(enter("gateway")) as running:
        called = running.post(f"/v1/services/{name}", {"input": "a"}).json()
        once = running.post(f"/v1/services/{name}", {"input": "a"}, idempotency_key=name).json()
        listed = [each["id"] for each in running.get("/v1/models").json()["data"]]
        looks = [running.get(path).status_code for path in (f"/readyz?service={name}", f"/admin/backlog/{name}")]
        metrics = running.get("/metrics").text

    assert (called["output"], once["output"], name in listed, looks) == ("a", "a", True, [200, 200])
    assert f'service="{name}"' in metrics


def _text(value: bytes | str | None) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def test_an_admin_operates(enter: Enter, connection: Connection, echo_spec: ServiceSpec, tmp_path: Path) -> None:
    name, file = echo_spec.name, tmp_path / "config.yaml"
    connection.client.delete(ServiceKeys(name).spec())
    admin = enter("admin", name)
    target = ("--url", admin, "--prefix", "ms")
    for rows in (8, 16):
        file.write_text(CONFIG.format(service=name, rows=rows, model="sleep:0"))
        millstream("config", "push", str(file), "--url", admin, "--replace")
    queue = queue_of(connection, name)
    queue.put(draft(), draft(client=""))

    assert "paused" in millstream("queue", "pause", name, *target)
    assert "drained" in millstream("queue", "drain", name, *target)
    assert "2 jobs purged" in millstream("queue", "purge", name, "--yes", *target)
    assert "resumed" in millstream("queue", "resume", name, *target)
    buried = [draft(), draft()]
    queue.put(*buried)
    queue.settle(queue.claim().claims, bury="max_attempts")
    assert "max_attempts" in millstream("dead", "export", name, *target)
    assert name in millstream("dead", "requeue", name, "--all", *target)
    assert "0 dead letters" in millstream("dead", "purge", name, "--yes", *target)


def test_a_client_reads_the_text_so_far_of_a_job(enter: Enter, connection: Connection, service: str) -> None:
    queue_of(connection, service).open()

    with opened(enter("client", service)) as limited:
        assert queue_of(limited, service).streams.partials(["0" * 32]) == [b""]


# -- and what it does not ------------------------------------------------------------------------------------------


def test_a_client_neither_claims_nor_settles_nor_publishes(enter: Enter, connection: Connection, service: str) -> None:
    queue = queue_of(connection, service)
    queue.open()
    (claim,) = queue.hold("w1", draft())
    queue.put(draft())
    client = enter("client")

    def settle(limited: Connection) -> object:
        return queue_of(limited, service).settle([claim])

    claiming = refused(client, lambda limited: queue_of(limited, service).claim())
    settling = refused(client, settle)
    waiting = refused(client, lambda limited: queue_of(limited, service).wait(wait_s=0.1))
    acknowledging = refused(client, lambda limited: limited.client.xack(queue.keys.streams()[1], "workers", "1-1"))
    pushing = refused(client, lambda limited: Registry(limited).push([spec("another")]))

    assert "script claim" in str(claiming)
    assert "script settle" in str(settling)
    assert "script claim" in str(waiting)
    assert "'xack'" in str(acknowledging)
    assert "'xgroup" in str(pushing)
    for error in (claiming, settling, waiting, acknowledging):
        assert "millstream acl --role worker" in error.hint
    assert queue.settle([claim]) == ["answered"]


def test_a_client_writes_neither_the_services_settings_nor_its_pause(
    enter: Enter, connection: Connection, server: EmbeddedServer, service: str
) -> None:
    if server.version[:2] < SELECTORS_SINCE:
        # What 6.2 cannot say is said to whoever asks for the rules.
        assert "before 7.0" in CliRunner().invoke(main, ["acl", "--role", "client", "--for-version", "6.2"]).stderr
        return
    keys = ServiceKeys(service)
    queue_of(connection, service).open()
    client = enter("client", service)
    harm: list[Callable[[redis.Redis], object]] = [
        lambda limited: limited.hset(keys.spec(), "max_queue_size", "1"),
        lambda limited: limited.pexpire(keys.spec(), 1),
        lambda limited: limited.set(keys.spec(), "gone"),
        lambda limited: limited.set(keys.paused(), "refusing"),
        lambda limited: limited.set(keys.cache("0" * 32), "no answer"),
        lambda limited: limited.xtrim(keys.stream(Priority.NORMAL), maxlen=0),
        lambda limited: limited.sadd("ms:services", "x"),
    ]

    for each in harm:
        refused(client, lambda limited, each=each: each(limited.client))  # type: ignore[misc]


@pytest.mark.parametrize("role", ["client", "worker", "viewer", "admin"])
def test_a_user_of_one_service_touches_no_other(enter: Enter, role: Role, connection: Connection, service: str) -> None:
    queue = queue_of(connection, service)
    queue.open()
    url = enter(role, "another")

    def read(limited: Connection) -> object:
        return Registry(limited).read(service)

    error = refused(url, read)
    assert "key" in str(error)
    refused(url, lambda limited: limited.client.xrange(queue.keys.stream(Priority.NORMAL)))


def test_a_viewer_changes_nothing(enter: Enter, connection: Connection, service: str) -> None:
    queue = queue_of(connection, service)
    queue.open()
    viewer = enter("viewer")

    adding = refused(viewer, lambda limited: queue_of(limited, service).put(draft()))
    refused(viewer, lambda limited: limited.client.xadd(queue.keys.streams()[1], {"v": "1"}))
    refused(viewer, lambda limited: limited.client.set(queue.keys.paused(), "1"))
    refused(viewer, lambda limited: limited.client.hset(queue.keys.spec(), "version", "2"))

    assert "millstream acl --role client" in adding.hint


def test_a_worker_adds_no_jobs_and_changes_no_settings(
    enter: Enter, connection: Connection, server: EmbeddedServer, service: str
) -> None:
    queue = queue_of(connection, service)
    queue.open()
    worker = enter("worker", service)

    refused(worker, lambda limited: limited.client.sadd("ms:services", "x"))
    refused(worker, lambda limited: Registry(limited).push([spec("another")]))
    if server.version[:2] >= SELECTORS_SINCE:
        refused(worker, lambda limited: queue_of(limited, service).put(draft()))
        refused(worker, lambda limited: limited.client.hset(queue.keys.spec(), "version", "2"))


@pytest.mark.parametrize("role", get_args(Role))
def test_no_role_runs_the_server(enter: Enter, role: Role) -> None:
    url = enter(role)
    for command in ("flushall", "config get *", "shutdown", "acl list", "keys *", "monitor"):
        refused(url, partial(_execute, command.split()))


def _execute(words: list[str], limited: Connection) -> object:
    return limited.client.execute_command(*words)  # type: ignore[no-untyped-call]


# -- scripts that the server has forgotten ---------------------------------------------------------------------------


def test_a_client_waits_for_a_worker_to_load_forgotten_scripts(
    enter: Enter, connection: Connection, service: str
) -> None:
    queue_of(connection, service).open()

    with opened(enter("client", service)) as client, opened(enter("worker", service)) as worker:
        calling, working = queue_of(client, service), queue_of(worker, service)
        job = Group(Priority.NORMAL, [draft()])
        connection.client.script_flush()

        with pytest.raises(BrokerUnavailable, match="lost the scripts") as caught, translated(client.safe_url):
            calling.streams.enqueue([job])
        assert is_transient(caught.value)
        assert "worker" in caught.value.hint

        working.lease.beat("w1", {}, [])
        assert [each.refused for each in calling.streams.enqueue([job])] == [""]


def test_nobody_but_those_who_must_can_load_a_script(enter: Enter) -> None:
    for role in ("client", "viewer"):
        refused(enter(role), lambda limited: limited.client.script_load("return 1"))


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_what_is_printed_for_a_version_is_what_its_server_would_be_told(server: EmbeddedServer, role: Role) -> None:
    version = ".".join(map(str, server.version))

    for words in ((), ("--service", "a", "--service", "b.c")):
        offline = millstream("acl", "--role", role, "--for-version", version, "--prefix", "ms", *words).split()

        assert offline == rules(server.url, role, *words)


def test_a_password_is_set_by_its_hash_and_logs_in(
    server: EmbeddedServer, connection: Connection, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    file.write_text("s3cret words\n")
    file.chmod(0o600)
    words = rules(server.url, "viewer", "--user", "reader", "--password-file", str(file))

    assert "s3cret" not in " ".join(words)
    connection.client.execute_command(*words)  # type: ignore[no-untyped-call]
    with opened(f"{server.url}?username=reader&password=s3cret%20words") as reader:
        assert isinstance(Registry(reader).names(), list)
    # Rules printed without a password leave the one there is alone.
    connection.client.execute_command(*rules(server.url, "viewer", "--user", "reader"))  # type: ignore[no-untyped-call]
    with opened(f"{server.url}?username=reader&password=s3cret%20words") as reader, pytest.raises(UnknownService):
        Registry(reader).read("nobody")
    connection.client.acl_deluser("reader")


def test_every_script_is_somebodys() -> None:
    from millstream.broker.roles import _SCRIPTS

    assert set(_SCRIPTS) == set(get_args(scripts.Name))
