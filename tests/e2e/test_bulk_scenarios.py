"""The scenarios of bulk runs at a small size: results exact, whatever was killed. Rates and memory are not judged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LONG = bool(os.environ.get("MILLSTREAM_LONG"))
SCENARIOS = Path(__file__).parents[2] / "benchmarks" / "scenarios.py"
NEEDS_SIZE = ("memory of", "bulk run / packing", "p99 of callers", "the run beside callers")
"""Targets that a run of few rows on a busy machine may miss."""

pytestmark = [pytest.mark.early, pytest.mark.timeout(400)]


def play(name: str, rows: int) -> dict[str, bool]:
    """Whether each target was met, by its name."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MILLSTREAM_")}
    command = [sys.executable, str(SCENARIOS), name, "--rows", str(rows)]
    done = subprocess.run(command, env=ours, capture_output=True, text=True, check=False)
    _, _, targets = done.stdout.partition("\nTargets\n")
    lines = [line.split("  ") for line in targets.splitlines() if line.endswith(("met", "MISSED"))]
    found = {words[0]: words[-1].strip() == "met" for words in lines}
    assert found, done.stdout + done.stderr
    assert done.returncode == (0 if all(found.values()) else 1), done.stdout + done.stderr
    return found


needs_long = pytest.mark.skipif(not LONG, reason="MILLSTREAM_LONG is not 1: it loads a model several times")


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("bulk-size", 10_000),
        pytest.param("bulk-rate", 200, marks=needs_long),
        pytest.param("bulk-beside", 50, marks=needs_long),
        ("bulk-kills", 100),
    ],
)
def test_results_are_exact(name: str, rows: int) -> None:
    found = play(name, rows)

    missed = [target for target, met in found.items() if not met and not target.startswith(NEEDS_SIZE)]
    assert len(found) >= 4
    assert missed == []


@needs_long
def test_texts_are_those_of_an_undisturbed_run(smollm2: Path) -> None:
    found = play("bulk-kills-texts", 20)

    assert len(found) >= 8
    assert [target for target, met in found.items() if not met] == []
