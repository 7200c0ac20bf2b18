"""The installed command and a user's own code: found beside config.yaml, refused in one line, never from the server."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from e2e.cli_support import Shell

from millstream.broker.queue.inspector import Inspector
from millstream.broker.transport.connection import Connection
from millstream.client import Client

DRAINED_S = 25.0

CODE = """
import random  # the library's, not the one beside this file


class Mill:
    def set_up(self, device):
        print("set up on", device, flush=True)

    def __call__(self, payloads):
        return [{"ground": each["corn"], "by": random.Random(each["corn"]).random() < 2} for each in payloads]

    def tear_down(self):
        print("ready: no more")
        print("torn down", flush=True)
"""


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


def project(home: Path, name: str, handler: str = "grain:Mill", code: str = CODE) -> Shell:
    """A user's project with a custom service, and files named as modules of the library and of ours."""
    home.mkdir(exist_ok=True)
    (home / "grain.py").write_text(code)
    for hostile in ("random", "client", "worker", "broker"):
        (home / f"{hostile}.py").write_text("raise RuntimeError('shadowed')\n")
    (home / "config.yaml").write_text(
        f"models: {{m: {{type: custom, handler: '{handler}', device: cpu}}}}\nservices: {{{name}: {{model: m}}}}\n"
    )
    return Shell(home)


def test_code_beside_the_configuration_answers_and_is_torn_down(tmp_path: Path, url: str, name: str) -> None:
    project(tmp_path / "project", name)
    elsewhere = Shell(tmp_path, url)

    with elsewhere.background("up", "project/config.yaml") as up, Client(url) as client:
        up.says(f"ready: {name} 1/1")
        answers = client.submit(name, [{"corn": n} for n in range(100)]).result()
        bare = Shell(tmp_path / "bare", url)
        bare.home.mkdir()
        refused = bare.run("worker", "run", name)
        up.interrupt()
        code = up.process.wait(DRAINED_S)

    assert answers == [{"ground": n, "by": True} for n in range(100)]
    assert code == 0
    # Standard output is the command's own: programs read there that its workers are ready.
    assert up.err.index("set up on cpu") < up.err.index("ready: no more") < up.err.index("torn down")
    assert "ready: no more" not in up.out
    assert "this worker's config.yaml names no handler" in refused.line(9)


def test_a_worker_with_the_code_needs_the_url_beside_it(tmp_path: Path, url: str, name: str) -> None:
    shell = Shell(project(tmp_path / "project", name).home, url)
    assert shell.run("config", "push").code == 0

    with shell.background("worker", "run", name) as run, Client(url) as client:
        run.says(f"ready: {name} 1/1")
        assert client.call(name, {"corn": 7}) == {"ground": 7, "by": True}
        connection = Connection(url, name="tests")
        (worker,) = Inspector(connection).services([name])[0].workers
        connection.close()
        run.interrupt()
        assert run.process.wait(DRAINED_S) == 0

    assert worker.device == "cpu"


@pytest.mark.parametrize(
    ("handler", "code", "said"),
    [
        ("grai:Mill", CODE, "there is no module 'grai' (put it into "),
        ("grain:Mil", CODE, "there is no 'Mil' in "),
        ("grain:Mill", "class Mill:\n    def __init__(self):\n        self.weights = {}['weights']\n", "grain.py:3"),
    ],
    ids=["module", "attribute", "constructor"],
)
def test_what_is_wrong_with_the_code_is_said_in_a_line(
    tmp_path: Path, url: str, name: str, handler: str, code: str, said: str
) -> None:
    shell = Shell(project(tmp_path / "project", name, handler, code).home, url)

    ended = shell.run("up")

    assert ended.code == 9
    assert "Traceback" not in ended.err
    (line,) = [line for line in ended.err.splitlines() if name in line]
    assert said in line
