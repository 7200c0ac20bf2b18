"""What a test does on a Cluster and on a master under Sentinel alike."""

from __future__ import annotations

import json
from pathlib import Path

from e2e.cli_support import Shell

CONFIG = """
models: {m: {type: echo}}
services: {from-a-file: {model: m}}
"""


def check_commands(home: Path, url: str, service: str) -> None:
    """The installed command looks at `service`, which has one worker, and operates it."""
    (home / "config.yaml").write_text(CONFIG)
    shell = Shell(home, url)

    assert "from-a-file" in _said(shell, "config", "push")
    names = {row["name"] for row in json.loads(_said(shell, "queue", "ls", "--json"))}
    assert names >= {service, "from-a-file"}
    assert _said(shell, "worker", "ls").count("\n") >= 2
    assert "redis-cli" in _said(shell, "queue", "peek", service)
    assert service in _said(shell, "queue", "pause", service)
    assert service in _said(shell, "queue", "drain", service)
    assert service in _said(shell, "queue", "resume", service)


def _said(shell: Shell, *words: str) -> str:
    ended = shell.run(*words)
    assert (ended.code, ended.err) == (0, ""), (words, ended)
    return ended.out.decode()
