"""The shell completes commands, options and services, by the script that `millstream completion` prints."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from e2e.cli_support import COMMAND, environment

CONFIG = "models: {m: {type: echo}}\nservices: {embed: {model: m}, embed-large: {model: m}, chat: {model: m}}\n"

ASK = """
eval "$("$0" completion bash)" || exit 1
ask() {
    COMP_WORDS=(millstream "$@") COMP_CWORD=$# COMPREPLY=()
    _millstream_completion millstream
    echo "${COMPREPLY[@]}"
}
ask worker dr
ask queue pause em
"""


def test_bash_completes_commands_and_services(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)

    done = subprocess.run(
        ["bash", "--norc", "-c", ASK, str(COMMAND)],
        cwd=tmp_path,
        env={**environment(tmp_path), "PATH": f"{COMMAND.parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )

    assert (done.stdout, done.stderr) == ("drain\nembed embed-large\n", "")
