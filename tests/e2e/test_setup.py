"""`scripts/setup` chooses a build of torch without a question: a wheel's index of our own, pip's installs stubbed."""

from __future__ import annotations

import functools
import json
import os
import pty
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import closing
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import create_server

import pytest

ROOT = Path(__file__).parents[2]
INDEX = "https://download.pytorch.org/whl/cpu"
DRIVER = "/proc/driver/nvidia/version"
(VERSION,) = re.findall(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
WHEEL = f"torch-{VERSION}+cpu-py3-none-any.whl"
ENDS_S = 60

STUB = f"""#!{sys.executable}
import json, os, pathlib, sys
words = sys.argv[1:]
home = pathlib.Path(os.environ["STUB"])
with (home / "said").open("a") as said:
    said.write(json.dumps(words) + "\\n")
if words[:2] == ["-m", "venv"]:
    venv = pathlib.Path(words[-1])
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").symlink_to(home / "bin/python3")
    (venv / "pyvenv.cfg").write_text(f"command = python -m venv {{venv.absolute()}}\\n")
if words[:2] == ["-m", "pip"] and ("index" in words or "download" in words):
    os.execv({sys.executable!r}, [{sys.executable!r}, *words])
near = (home / "near").exists()
sys.exit(1 if not near and ("show" in words or "--dry-run" in words) else 0)
"""


class Machine:
    """A checkout of its own, and the commands that a fresh machine has: no pip there installs anything."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.index = "http://127.0.0.1:9"
        (home / "bin").mkdir()
        (home / "checkout" / "scripts").mkdir(parents=True)
        self.add("python3", STUB)
        for name in ("constraints.txt", "pyproject.toml"):
            (home / "checkout" / name).write_bytes((ROOT / name).read_bytes())

    def add(self, command: str, text: str) -> None:
        file = self.home / "bin" / command
        file.write_text(text)
        file.chmod(0o755)

    def has(self, what: str) -> None:
        (self.home / what).touch()

    def set_up(
        self, torch: str | None = None, stdin: int = subprocess.DEVNULL, extra: str = "demo"
    ) -> subprocess.CompletedProcess[str]:
        text = (ROOT / "scripts" / "setup").read_text()
        assert text.count(INDEX) == text.count(DRIVER) == 1
        script = self.home / "checkout" / "scripts" / "setup"
        script.write_text(text.replace(INDEX, self.index).replace(DRIVER, str(self.home / "driver")))
        environ = {
            "PATH": f"{self.home / 'bin'}:{os.defpath}",
            "STUB": str(self.home),
            "HOME": str(self.home),
            "PIP_CONFIG_FILE": os.devnull,
            **({"MILLSTREAM_TORCH": torch} if torch else {}),
        }
        return subprocess.run(
            ["bash", script, extra],
            env=environ,
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=ENDS_S,
            check=False,
        )

    @property
    def said(self) -> list[list[str]]:
        """The commands of Python so far."""
        return [json.loads(line) for line in (self.home / "said").read_text().splitlines()]

    @property
    def installed(self) -> list[str]:
        """What pip was told to install last."""
        return [words for words in self.said if "install" in words and "--dry-run" not in words][-1]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A Linux machine with neither a build of torch, nor a driver, nor an index that answers."""
    return Machine(tmp_path)


@pytest.fixture
def index(machine: Machine) -> Iterator[str]:
    """An index that has the pinned CPU build, in reach of `machine`."""
    folder = machine.home / "index"
    (folder / "torch").mkdir(parents=True)
    with zipfile.ZipFile(folder / "torch" / WHEEL, "w") as wheel:
        info = f"torch-{VERSION}+cpu.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {VERSION}+cpu\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (folder / "torch" / "index.html").write_text(f'<a href="{WHEEL.replace("+", "%2B")}">{WHEEL}</a>')
    handler = functools.partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        machine.index = f"http://127.0.0.1:{server.server_port}"
        yield machine.index
        server.shutdown()
        thread.join()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        return


def test_without_a_driver_and_a_terminal_the_cpu_build_is_taken(machine: Machine, index: str) -> None:
    done = machine.set_up()

    assert done.returncode == 0, done
    assert machine.installed[-1] == f".venv/torch/{WHEEL}"
    assert "no NVIDIA driver here, so the CPU build" in done.stdout
    assert "about 0.2 GB" in done.stdout
    assert "set MILLSTREAM_TORCH" in done.stdout


def test_a_terminal_is_not_asked(machine: Machine, index: str) -> None:
    ours, terminal = pty.openpty()

    done = machine.set_up(stdin=terminal)

    os.close(ours)
    os.close(terminal)
    assert done.returncode == 0, done
    assert machine.installed[-1] == f".venv/torch/{WHEEL}"


def test_without_the_index_pip_chooses(machine: Machine) -> None:
    done = machine.set_up()

    assert done.returncode == 0, done
    assert machine.installed[-2:] == ["-e", ".[demo]"]
    assert "pip's own choice" in done.stdout
    assert "about 2.7 GB" in done.stdout
    assert "set MILLSTREAM_TORCH" in done.stdout


def test_an_index_that_never_answers_is_not_waited_for(machine: Machine) -> None:
    with closing(create_server(("127.0.0.1", 0))) as silent:
        machine.index = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = machine.set_up()

    assert done.returncode == 0, done
    assert machine.installed[-2:] == ["-e", ".[demo]"]
    assert "pip's own choice" in done.stdout


def test_an_index_without_the_pinned_version_is_not_taken(machine: Machine, index: str) -> None:
    other = WHEEL.replace(VERSION, "0.1")
    page = machine.home / "index" / "torch" / "index.html"
    page.write_text(page.read_text().replace(WHEEL, other).replace(WHEEL.replace("+", "%2B"), other))

    done = machine.set_up()

    assert done.returncode == 0, done
    assert machine.installed[-2:] == ["-e", ".[demo]"]


@pytest.mark.parametrize("driver", ["file", "command"])
def test_with_a_driver_pip_chooses(machine: Machine, index: str, driver: str) -> None:
    if driver == "file":
        machine.has("driver")
    else:
        machine.add("nvidia-smi", "#!/bin/sh\n")

    done = machine.set_up()

    assert done.returncode == 0, done
    assert machine.installed[-2:] == ["-e", ".[demo]"]
    assert "with CUDA: a download of about 2.7 GB" in done.stdout


def test_a_build_on_this_machine_is_taken_whatever_else_there_is(machine: Machine, index: str) -> None:
    machine.has("near")

    done = machine.set_up()

    assert done.returncode == 0, done
    assert machine.installed[-2:] == ["-e", ".[demo]"]
    assert "GB" not in done.stdout


def test_a_mac_takes_what_pip_takes(machine: Machine, index: str) -> None:
    machine.add("uname", "#!/bin/sh\necho Darwin\n")

    done = machine.set_up()

    assert done.returncode == 0, done
    assert machine.installed[-2:] == ["-e", ".[demo]"]
    assert "GB" not in done.stdout


def test_the_default_is_pips_own_choice(machine: Machine, index: str) -> None:
    done = machine.set_up(torch="default")

    assert done.returncode == 0, done
    assert machine.installed[-2:] == ["-e", ".[demo]"]


def test_a_wheel_and_an_index_can_be_named(machine: Machine, index: str) -> None:
    wheel = machine.home / "index" / "torch" / WHEEL

    for torch in (str(wheel), f"--no-index --find-links {index}/torch/ torch"):
        done = machine.set_up(torch=torch)

        assert done.returncode == 0, done
        assert machine.installed[-1] == f".venv/torch/{WHEEL}"
        (machine.home / "checkout" / ".venv" / ".installed-demo").unlink()


def test_a_name_that_is_no_build_ends_it_with_pips_own_words(machine: Machine) -> None:
    done = machine.set_up(torch="/no/such/torch.whl")

    assert done.returncode == 1
    assert "/no/such/torch.whl" in done.stderr


def test_chat_is_the_demo_and_the_language_model_each_time(machine: Machine) -> None:
    machine.has("near")

    for _ in range(2):
        done = machine.set_up(extra="chat")
        assert done.returncode == 0, done

    assert machine.installed[-2:] == ["-e", ".[demo]"]
    assert machine.said.count(["-P", "scripts/smollm2.py"]) == 2
    assert len([words for words in machine.said if "install" in words and ".[demo]" in words]) == 1


def test_demo_loads_no_language_model(machine: Machine) -> None:
    machine.has("near")

    machine.set_up()

    assert ["-P", "scripts/smollm2.py"] not in machine.said
