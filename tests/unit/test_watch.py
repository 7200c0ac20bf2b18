"""A worker that the tests stop is known to be alive: one that has just ended may look as if it still held its jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from e2e.watch import is_stopped
from support import eventually


def test_a_process_is_stopped_from_the_signal_until_it_goes_on() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with process:
        assert not is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        eventually(lambda: is_stopped(process.pid))
        process.send_signal(signal.SIGCONT)
        eventually(lambda: not is_stopped(process.pid))
        process.kill()


def test_a_process_that_has_ended_is_not_taken_for_a_stopped_one() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    # As of any zombie: the signal reaches nobody, and nothing says so.
    os.kill(process.pid, signal.SIGSTOP)

    with pytest.raises(ProcessLookupError, match="has ended"):
        is_stopped(process.pid)
    process.wait()
    with pytest.raises(ProcessLookupError):
        is_stopped(process.pid)
