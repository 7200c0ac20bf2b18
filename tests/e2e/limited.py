"""A process that calls a limited service as often as it may: limited.py SERVICE TENANT CLOCK_S WAIT.

CLOCK_S: how far this process's clocks are off, seconds. WAIT: 1 to wait as long as the server says, 0 to ask again at
once. Tenant "rows" sends calls of one to four short texts, any other tenant single texts of about 50 tokens. At the end
of input no new calls; when all have ended, prints how many were answered.
"""

from __future__ import annotations

import sys
import time

SERVICE, TENANT, CLOCK_S, WAIT = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4] == "1"
_time, _monotonic = time.time, time.monotonic
# Before anything else is imported: whoever asks for the time gets the wrong one.
time.time = lambda: _time() + CLOCK_S
time.monotonic = lambda: _monotonic() + CLOCK_S

import itertools  # noqa: E402
import threading  # noqa: E402

from millstream.broker.contract.errors import RateLimited  # noqa: E402
from millstream.client import Client  # noqa: E402

THREADS = 4
LONG = " ".join(["word"] * 40)


class Crowd:
    """Threads that share one client."""

    def __init__(self) -> None:
        self._client = Client()
        self._lock = threading.Lock()
        self.answered = 0
        self.over = threading.Event()

    def call(self, inputs: list[str]) -> bool:
        """Whether the call was admitted; its answer is waited for."""
        try:
            answer = self._client.submit(SERVICE, inputs, wait=WAIT, tenant=TENANT).result()
        except RateLimited:
            return False
        assert answer == inputs
        with self._lock:
            self.answered += 1
        return True

    def call_on(self, first: int) -> None:
        for number in itertools.count(first):
            inputs = ["short"] * (1 + number % 4) if TENANT == "rows" else [f"{number} {LONG}"]
            while not self.over.is_set() and not self.call(inputs):
                pass
            if self.over.is_set():
                return


def main() -> None:
    crowd = Crowd()
    running = [threading.Thread(target=crowd.call_on, args=(first,)) for first in range(THREADS)]
    for thread in running:
        thread.start()
    sys.stdin.read()
    crowd.over.set()
    for thread in running:
        thread.join()
    sys.stdout.write(f"{crowd.answered}\n")


if __name__ == "__main__":
    main()
