"""The installed command: it says what is wrong in one line and soon, and it runs, shows and ends what it started."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from e2e.cli_support import Shell, some
from e2e.sites import MODEL, echo, minilm
from engines import await_written
from support import eventually

from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection
from millstream.client import Client

pytestmark = pytest.mark.early

DRAINED_S = 25.0
"""Less than a supervisor waits before it kills: a worker that did not drain by itself fails the test."""

TEXT = "水车转动\u3000万物不息"


@pytest.fixture
def connection(url: str) -> Iterator[Connection]:
    opened = Connection(url, name="tests")
    yield opened
    opened.close()


@pytest.fixture
def alone(tmp_path: Path) -> Shell:
    """A shell that knows no server."""
    return Shell(tmp_path)


@pytest.fixture
def shell(tmp_path: Path, url: str) -> Shell:
    """A shell that knows the server by MILLSTREAM_REDIS_URL, and nothing else."""
    return Shell(tmp_path, url)


@pytest.fixture
def idle(connection: Connection) -> str:
    """An embedding service without a worker."""
    spec = minilm()
    Registry(connection).push([spec])
    return spec.name


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


def configure(shell: Shell, name: str, model: str, runtime: str = "worker_count: 1") -> None:
    """Write config.yaml with one service, `name`, of one `model`."""
    services = f"services: {{{name}: {{model: m, runtime: {{{runtime}}}}}}}"
    (shell.home / "config.yaml").write_text(f"models: {{m: {{{model}}}}}\n{services}\n")


ECHO = "type: echo"
MINILM = f'type: embedding, model_name: "{MODEL}", device: cpu'


# -- what is wrong, in one line, within three seconds, with its own exit code


@some(["embed", "hello"], ["queue", "ls"], ["queue", "peek", "embed"], ["worker", "run"])
def test_without_a_server_a_command_says_how_to_get_one(alone: Shell, words: list[str]) -> None:
    assert "millstream up" in alone.run(*words).line(5)


@some(["worker", "run"], ["embed", "hello"], ["worker", "ls"], ["queue", "ls"])
def test_a_server_that_is_away_is_named(alone: Shell, words: list[str]) -> None:
    assert "redis://127.0.0.1:1" in alone.run(*words, "--url", "redis://127.0.0.1:1").line(5)


def test_up_on_a_server_that_is_away_starts_nothing(alone: Shell, name: str) -> None:
    configure(alone, name, ECHO)

    ended = alone.run("up", "--url", "redis://127.0.0.1:1")

    assert "redis://127.0.0.1:1" in ended.line(5)


def test_a_model_folder_that_is_not_there_is_named_before_anything_starts(alone: Shell, name: str) -> None:
    configure(alone, name, "type: embedding, model_name: ./no-such-folder")

    assert "no-such-folder" in alone.run("up").line(9)
    assert not (alone.home / "millstream").exists()


def test_a_package_that_is_not_installed_is_named_with_the_fix(alone: Shell, name: str) -> None:
    configure(alone, name, 'type: embedding, model_name: "package:no_such_package/model"')

    assert "pip install no-such-package" in alone.run("up").line(9)


def test_a_typo_in_the_configuration_is_named_with_its_line_and_the_fix(alone: Shell, name: str) -> None:
    configure(alone, name, ECHO, "worker_cout: 1")

    line = alone.run("up").line(3)

    assert "config.yaml:2" in line
    assert "worker_count" in line


def test_up_without_a_configuration_says_which_file_it_wants(alone: Shell) -> None:
    assert "config.yaml" in alone.run("up").line(3)


@some(["embed", "hello", "--service"], ["queue", "peek"], ["worker", "run"])
def test_an_unknown_service_meets_the_nearest_name(shell: Shell, idle: str, words: list[str]) -> None:
    assert f"did you mean {idle}?" in shell.run(*words, idle[:-1] + "x").line(4)


def test_a_text_that_is_no_string_is_named_by_its_index(shell: Shell, idle: str) -> None:
    ended = shell.run("embed", "--json", "--service", idle, stdin=b'["fine", {"not": "a text"}]')

    assert "text 1" in ended.line(2)


def test_without_a_live_worker_embed_says_so_instead_of_waiting(shell: Shell, idle: str) -> None:
    assert idle in shell.run("embed", "hello", "--service", idle).line(6)


def test_embed_says_so_where_a_service_embeds_nothing(shell: Shell, connection: Connection) -> None:
    spec = echo("")
    Registry(connection).push([spec])

    assert "'echo'" in shell.run("embed", "hello", "--service", spec.name).line(2)


def test_a_service_registered_with_other_settings_is_left_alone(
    shell: Shell, connection: Connection, name: str
) -> None:
    spec = echo("", max_queue_size=7).model_copy(update={"name": name})
    Registry(connection).push([spec])
    configure(shell, name, ECHO)

    ended = shell.run("up")

    assert (ended.code, len(ended.err.splitlines())) == (3, 1)
    assert "--replace" in ended.err
    assert Registry(connection).read(name) == spec


@some(["up"], ["embed"], ["worker", "run"], ["queue", "peek", "embed"], ["queue", "ls"])
def test_an_unknown_option_is_wrong_usage(alone: Shell, words: list[str]) -> None:
    ended = alone.run(*words, "--no-such-option")

    assert ended.code == 2
    assert "Traceback" not in ended.err


# -- what runs, shows itself and ends


def test_a_waiting_text_is_shown_as_it_lies_and_embedded_once_up_runs(
    shell: Shell, connection: Connection, name: str
) -> None:
    configure(shell, name, MINILM)
    assert shell.run("config", "push").code == 0
    with Client(shell.url, prefix="ms") as client:
        handle = client.submit(name, [TEXT])
        eventually(lambda: Inspector(connection).services([name])[0].depth == 1)

        peeked = shell.run("queue", "peek", name, "--priority", "normal").out.decode()
        listed = shell.run("queue", "ls").out.decode()
        with shell.background("up") as up:
            up.says(f"ready: {name} 1/1")
            answer = handle.result(timeout=60)
            prompted = client.embed(TEXT, service=name, prompt="query: ")
            embedded = shell.run("embed", TEXT, "and a stream", "--service", name)
            asked = ("--prompt", "query: ", "--dimensions", "3", "--no-normalize")
            cut = shell.run("embed", TEXT, "--service", name, *asked)
            array = shell.run("embed", "--service", name, "--format", "npy", stdin=b"one\nno \xff text\nthree\n")
            workers = up.children()
            up.interrupt()
            code = up.process.wait(DRAINED_S)

            assert f'\nbody {{"inputs":["{TEXT}"]}}\n' in peeked
            assert f"# redis-cli -u {shell.url} XRANGE 'ms:{{{name}}}:q:normal' - + COUNT 10\n" in peeked
            assert re.search(rf"^{name} +0 +1 +0 +0 +0 +\d+\.\ds +0 +- +- +0 +0 +-$", listed, re.MULTILINE)
            vectors = [json.loads(line) for line in embedded.out.splitlines()]
            assert [vector["index"] for vector in vectors] == [0, 1]
            np.testing.assert_allclose(vectors[0]["embedding"], np.asarray(answer)[0], atol=1e-5)
            np.testing.assert_allclose(json.loads(cut.out)["embedding"], prompted[:3], atol=1e-5)
            rows = np.load(io.BytesIO(array.out))
            assert (rows.shape, [bool(np.isnan(row).any()) for row in rows]) == ((3, 384), [False, True, False])
            assert (array.code, len(array.err.splitlines())) == (9, 1)
            assert "text 1: " in array.err
            assert (code, len(workers), up.left()) == (0, 1, [])


def test_up_starts_a_server_says_how_to_look_and_leaves_no_process(alone: Shell, name: str) -> None:
    configure(alone, name, ECHO, "worker_count: 2")

    with alone.background("up") as up:
        up.says(f"ready: {name} 2/2")
        socket = re.search(r"redis-cli -s (\S+) XRANGE", up.out)
        use = re.search(r"export MILLSTREAM_REDIS_URL=(\S+)", up.out)
        assert socket
        assert use
        listed = Shell(alone.home, use[1]).run("queue", "ls", "--json")
        found = alone.run("queue", "ls", "--json")
        children = up.children()
        up.interrupt()
        code = up.process.wait(DRAINED_S)

        (service,) = json.loads(listed.out)
        assert (service["name"], len(service["workers"])) == (name, 2)
        assert json.loads(found.out)[0]["name"] == name, "a local `up` is found without a URL"
        assert "draining" in up.out
        assert (code, len(children), up.left()) == (0, 3, [])
        assert not Path(socket[1]).exists()


def test_up_starts_its_server_again_with_its_data_where_it_crashed(alone: Shell, name: str) -> None:
    configure(alone, name, ECHO)

    with alone.background("up", "--port", "0") as up:
        up.says(f"ready: {name} 1/1")
        url = up.out.split("MILLSTREAM_REDIS_URL=")[-1].split()[0]
        (server,) = [pid for pid, line in up.children().items() if b"millstream.worker" not in line]
        await_written(url)
        os.kill(server, signal.SIGKILL)
        eventually(lambda: "the server is back" in up.err, within_s=60.0)

        with Client(url, prefix="ms") as client:
            answer = client.submit(name, ["still", "turning"], timeout=60).result()
        up.children()
        up.interrupt()
        code = up.process.wait(DRAINED_S)

        assert answer == ["still", "turning"]
        assert (code, up.left()) == (0, [])


def test_a_worker_needs_only_the_url_and_drains_on_sigterm(shell: Shell, connection: Connection) -> None:
    spec = echo("sleep:0.5", batch_size=1)
    Registry(connection).push([spec])

    with shell.background("worker", "run", spec.name, "--count", "2") as run, Client(shell.url, prefix="ms") as client:
        run.says(f"ready: {spec.name} 2/2")
        handle = client.submit(spec.name, ["a", "b"], timeout=60)
        eventually(lambda: Inspector(connection).services([spec.name])[0].in_flight > 0)
        workers = run.children()
        run.process.send_signal(signal.SIGTERM)
        code = run.process.wait(DRAINED_S)

        assert handle.result(timeout=10) == ["a", "b"]
        assert (code, len(workers), run.left()) == (0, 2, [])


def test_a_second_ctrl_c_kills_at_once_and_its_jobs_go_back_to_the_queue(
    shell: Shell, connection: Connection, name: str
) -> None:
    configure(shell, name, 'type: echo, model_name: "sleep:0.3"', "worker_count: 1, batch_size: 1")
    inspect = Inspector(connection)

    with shell.background("up") as up, Client(shell.url, prefix="ms") as client:
        up.says(f"ready: {name} 1/1")
        client.submit(name, ["long"] * 50)
        eventually(lambda: inspect.services([name])[0].in_flight > 0)
        # It will never drain.
        (worker,) = up.children()
        os.kill(worker, signal.SIGSTOP)
        up.interrupt()
        up.says("draining")
        up.interrupt()
        code = up.process.wait(10)

        seen = inspect.services([name])[0]
        assert (code, up.left()) == (130, [])
        assert (seen.in_flight, seen.returned > 0) == (0, True)


def test_worker_ls_shows_what_runs_and_how_the_worker_before_ended(
    shell: Shell, connection: Connection, name: str
) -> None:
    configure(
        shell, name, 'type: echo, model_name: "hang:stone"', "worker_count: 1, stall_timeout: 20s, max_attempts: 1"
    )
    inspect = Inspector(connection)

    with shell.background("up") as up, Client(shell.url, prefix="ms") as client:
        up.says(f"ready: {name} 1/1")
        client.submit(name, ["a mill", "stone"])
        eventually(lambda: any(worker.running for worker in inspect.services([name])[0].workers))
        stuck = shell.run("worker", "ls").out.decode()
        eventually(lambda: any(worker.past for worker in inspect.services([name])[0].workers), within_s=60.0)
        listed = shell.run("worker", "ls").out.decode()
        found = json.loads(shell.run("worker", "ls", "--json").out)

        line = rf"^{name} +\S+ +\S+ +\d+ +auto +ready +"
        assert re.search(rf"{line}1 for \d+\.\ds +0 +0\.0 +0% +- +2048 +- +- +- +- +\d\.\ds +-$", stuck, re.MULTILINE)
        past = r"was killed by SIGKILL during run \(no progress for \d+\.\d s, the stall_timeout is 20 s\)"
        assert re.search(rf"{line}- +\d+ +.* {past}$", listed, re.MULTILINE)
        (record,) = [each for each in found if each["service"] == name]
        assert record["pid"] in up.children()
        assert (record["running"], record["padding"]) == (0, None)
        assert re.fullmatch(past, record["past"])


def test_without_a_live_worker_worker_ls_says_so(shell: Shell) -> None:
    assert shell.run("worker", "ls", "--prefix", "nobodys").out == f"no worker is alive on {shell.url}\n".encode()


def test_workers_of_two_environments_on_one_server_are_apart(tmp_path: Path, url: str, name: str) -> None:
    blue, green = environments = [Shell(tmp_path / colour, url) for colour in ("blue", "green")]
    for shell in environments:
        shell.home.mkdir()
        configure(shell, name, ECHO)
        with (shell.home / "config.yaml").open("a") as file:
            file.write(f"redis: {{key_prefix: {shell.home.name}}}\n")

    with blue.background("up") as first, green.background("up") as second:
        first.says(f"ready: {name} 1/1")
        second.says(f"ready: {name} 1/1")
        (theirs,) = json.loads(green.run("worker", "ls", "--json").out)
        (worker,) = first.children()
        os.kill(worker, signal.SIGKILL)
        eventually(lambda: "the next starts" in first.err)
        answer = blue.run("worker", "ls", "--prefix", "green", "--json")
        first.interrupt()
        code = first.process.wait(DRAINED_S)

        (still,) = json.loads(answer.out)
        assert (still["consumer"], still["past"]) == (theirs["consumer"], "")
        assert (code, blue.run("worker", "ls").out.startswith(b"no worker is alive")) == (0, True)
        assert json.loads(green.run("queue", "ls", "--json").out)[0]["workers"][0]["pid"] == theirs["pid"]


def test_push_of_other_settings_names_the_first_differences_and_changes_nothing(
    shell: Shell, connection: Connection, name: str
) -> None:
    configure(shell, name, ECHO, "batch_size: 8, truncate: end, max_attempts: 2, max_queue_size: 9")
    assert shell.run("config", "push").code == 0
    configure(shell, name, ECHO, "batch_size: 64, truncate: end, max_attempts: 5, max_queue_size: 9")

    refused = shell.run("config", "push")

    line = refused.line(3)
    assert f"'{name}'" in line
    assert "runtime.batch_size is 8, here 64, runtime.max_attempts is 2, here 5 (push with --replace" in line
    assert Registry(connection).read(name).runtime.batch_size == 8
    assert shell.run("config", "push", "--replace").out == f"{name}: published\n".encode()
    assert Registry(connection).read(name).runtime.batch_size == 64
