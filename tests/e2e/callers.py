"""A process that calls a service through the client: callers.py SERVICE THREADS ANSWERS [single], until end of input.

Prints "calling" after a first call; at the end, as JSON, how many were made and answered, and what went wrong.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time

from e2e.reference import TEXTS, Answers, answers_of

from millstream.client import Client


class Callers:
    """Threads that call again and again, sharing one client."""

    def __init__(self, service: str, answers: Answers, sizes: tuple[int, ...]) -> None:
        self._client = Client()
        self._service = service
        self._answers = answers
        self._sizes = sizes
        self._lock = threading.Lock()
        self.over = threading.Event()
        self.calls = 0
        self.answered = 0
        self.wrong: list[str] = []

    def call_once(self) -> None:
        self._client.submit(self._service, TEXTS[:1]).result()

    def call(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self.over.is_set():
            texts = chance.choices(TEXTS, k=chance.choice(self._sizes))
            problem = self._problem(texts)
            with self._lock:
                self.calls += 1
                self.answered += not problem
                self.wrong += [problem] if problem else []

    def _problem(self, texts: list[str]) -> str:
        try:
            answer = self._client.submit(self._service, texts).result()
        except Exception as error:  # noqa: BLE001 - the test reports it
            return f"{type(error).__name__}: {error}"
        return f"a wrong answer to {texts}" if self._answers.wrong(texts, answer) else ""


def main() -> None:
    service, threads, name, *single = sys.argv[1:]
    callers = Callers(service, answers_of(name), (1,) if single else (1, 1, 1, 4, 8))
    running = [threading.Thread(target=callers.call, args=(time.time_ns() + each,)) for each in range(int(threads))]
    callers.call_once()
    sys.stdout.write("calling\n")
    sys.stdout.flush()
    for thread in running:
        thread.start()
    sys.stdin.read()
    callers.over.set()
    for thread in running:
        thread.join()
    json.dump({"calls": callers.calls, "answered": callers.answered, "wrong": callers.wrong[:5]}, sys.stdout)


if __name__ == "__main__":
    main()
