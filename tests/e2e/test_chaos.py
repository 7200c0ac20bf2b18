"""Faults by a seed, with a ledger outside the product: every promise holds, and every kind of fault landed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos.py"
SEED = 7
SECONDS = 60 if os.environ.get("MILLSTREAM_LONG") else 40

pytestmark = [pytest.mark.early, pytest.mark.timeout(400)]


def test_faults_by_a_seed_break_no_promise(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLSTREAM_")}

    run = subprocess.run(
        [
            sys.executable,
            CHAOS,
            "--seconds",
            str(SECONDS),
            "--seed",
            str(SEED),
            "--fsync",
            "always",
            "--keep",
            tmp_path / "run",
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
