"""The parts of benchmarks/chaos.py. They share with the tests what starts, stops and watches processes."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[2] / "tests"

if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))
