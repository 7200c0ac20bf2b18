"""What the packages promise to those who import them: types, no model library, scripts that are found."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("broker", "telemetry", "worker", "client", "cli")

_IMPORT_ONE_BY_ONE = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(name, *{"torch", "transformers", "sentence_transformers"} & sys.modules.keys())
"""


def modules_of(package: str) -> list[str]:
    """The dotted names of a package folder's modules, the package itself first."""
    files = sorted((ROOT / package).rglob("*.py"))
    dotted = [".".join(["millstream", *path.relative_to(ROOT).with_suffix("").parts]) for path in files]
    return sorted(name.removesuffix(".__init__") for name in dotted)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_carries_its_types(package: str) -> None:
    assert (resources.files(f"millstream.{package}") / "py.typed").is_file()


@pytest.mark.parametrize(
    "modules",
    [modules_of("broker"), modules_of("client"), ["millstream.cli.main"]],
    ids=["broker", "client", "cli.main"],
)
def test_a_caller_imports_no_model_library(modules: list[str], tmp_path: Path) -> None:
    probe = [sys.executable, "-c", _IMPORT_ONE_BY_ONE, *modules]

    imported = subprocess.run(probe, cwd=tmp_path, check=False, capture_output=True, text=True)

    assert imported.stderr == ""
    assert imported.stdout.splitlines() == modules


def test_the_scripts_are_found_as_package_resources() -> None:
    scripts = {path.name for path in (resources.files("millstream.broker.queue") / "lua").iterdir()}

    assert {"enqueue.lua", "claim.lua", "settle.lua"} <= scripts
