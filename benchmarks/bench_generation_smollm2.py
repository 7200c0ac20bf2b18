"""Text generation with a real model, SmolLM2-135M-Instruct: two dtypes, one and two threads, alone and beside others.

bench_generation.py says which ways are compared.
"""

from __future__ import annotations

from bench_generation import DTYPES, PLACES, Choice, measured
from measure import Effort, Report
from stage import Stage

REAL = Choice("smollm2", dtypes=DTYPES, threads=(1, 2), contexts=("short",), places=PLACES)


def measure(stage: Stage, effort: Effort) -> Report:
    return measured(stage, effort, REAL.but(effort.options))
