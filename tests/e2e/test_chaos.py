"""A minute of faults by a seed, with a ledger outside the product: every promise holds, and every fault landed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos.py"
SEED = 7

pytestmark = [pytest.mark.early, pytest.mark.timeout(400)]


def test_a_minute_of_faults_breaks_no_promise(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLSTREAM_")}

    run = subprocess.run(
        [
            sys.executable,
            CHAOS,
            "--seconds",
            "60",
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
