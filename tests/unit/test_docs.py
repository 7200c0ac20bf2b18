"""The code map is only worth reading while it names what is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

_PATH = re.compile(r"`([\w.*-][\w./*-]*(?:/|\.(?:py|lua|md)))`")


def test_architecture_names_only_paths_that_exist() -> None:
    named = _PATH.findall((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))

    assert named
    assert [path for path in named if not list(ROOT.glob(path))] == []
