"""The wheel, installed where there is no torch, beside files that bear our packages' names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("broker", "telemetry", "worker", "client", "cli")

# What PYTHONPATH names would be found before the installed wheel.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

_NO_MODEL_LIBRARIES = """
import sys


class NoModelLibraries:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "sentence_transformers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NoModelLibraries)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """The command's output; its whole error text where it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=_ENVIRONMENT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def pip(*words: str | Path, cwd: Path) -> str:
    return run(sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", *words, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build in place leaves a build folder, whose old files end up in the next wheel."""
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", "dist", ".", cwd=source)

    (built,) = (source / "dist").glob("millstream-*.whl")
    return built


@dataclass(frozen=True)
class Install:
    bin: Path
    site: Path


@pytest.fixture(scope="module")
def install(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Install:
    """A venv with the wheel and, by a .pth line, the dependencies of this one; model libraries cannot be imported."""
    home = tmp_path_factory.mktemp("caller") / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    (site,) = home.glob("lib/python*/site-packages")
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "no_model_libraries.py").write_text(_NO_MODEL_LIBRARIES)
    (site / "caller.pth").write_text(f"{here}\nimport no_model_libraries\n")

    pip("--python", home / "bin" / "python", "install", "--no-deps", "--no-index", wheel, cwd=home)

    return Install(bin=home / "bin", site=site)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A caller's project, full of modules named like our packages."""
    for path in ("client.py", "broker.py", "cli.py", "worker/__init__.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("raise RuntimeError('the caller\\'s own module was imported')\n")
    return tmp_path


def test_the_wheel_carries_every_module_script_and_type_marker(wheel: Path) -> None:
    expected = {
        f"millstream/{path.relative_to(ROOT).as_posix()}"
        for package in PACKAGES
        for pattern in ("*.py", "*.lua", "py.typed")
        for path in (ROOT / package).rglob(pattern)
    }

    carried = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("millstream/")}

    assert carried == expected


def test_a_caller_without_torch_imports_the_client_beside_hostile_names(install: Install, hostile: Path) -> None:
    program = "from millstream.client import Client, client; print(client.__file__)"

    where = run(install.bin / "python", "-c", program, cwd=hostile)

    assert Path(where.strip()).is_relative_to(install.site)


def test_the_scripts_are_found_in_the_installed_wheel(install: Install, hostile: Path) -> None:
    program = "import importlib.resources as r; print((r.files('millstream.broker.queue') / 'lua/claim.lua').is_file())"

    assert run(install.bin / "python", "-c", program, cwd=hostile) == "True\n"


@pytest.mark.parametrize(
    "command",
    [["millstream"], ["python", "-c", "from millstream.cli.main import main; main()"]],
    ids=["console script", "program"],
)
def test_the_command_shows_its_help_beside_hostile_names(install: Install, hostile: Path, command: list[str]) -> None:
    program, *words = command

    assert "Usage: " in run(install.bin / program, *words, "--help", cwd=hostile)


def test_a_caller_without_torch_is_what_these_tests_run(install: Install, hostile: Path) -> None:
    program = "import numpy, torch"

    with pytest.raises(AssertionError, match="No module named 'torch'"):
        run(install.bin / "python", "-c", program, cwd=hostile)
