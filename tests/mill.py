"""Code as a user would write it for a custom service: it answers, or fails, as each payload says."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

FITS = 16
"""Payloads that fit into the memory of `Narrow`."""


class Mill:
    """Doubles `n`. A payload with `do` fails in that way; to `seen` it says how many calls and rows it ran before."""

    def __init__(self) -> None:
        self.calls = self.rows = 0

    def __call__(self, payloads: Sequence[dict[str, Any]]) -> list[Any]:
        seen = [self.calls, self.rows]
        orders = {each.get("do") for each in payloads}
        if "seen" not in orders:
            self.calls, self.rows = self.calls + 1, self.rows + len(payloads)
        if "raise" in orders:
            raise RuntimeError("a stone in the mill")
        if "exit" in orders:
            raise SystemExit("a stone in the mill")
        if "interrupt" in orders:
            raise KeyboardInterrupt("a stone in the mill")
        if "cancel" in orders:
            raise asyncio.CancelledError("a stone in the mill")
        if "exhaust" in orders:
            raise MemoryError
        if "exhaust the device" in orders:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        answers = [_answer(each, seen) for each in payloads]
        return answers[1:] if "miscount" in orders else answers


class Narrow:
    """Doubles `n`, at most FITS payloads at once: a device whose memory is full beyond."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, payloads: Sequence[dict[str, Any]]) -> list[Any]:
        if payloads[0].get("do") == "seen":
            return [list(self.sizes)]
        self.sizes.append(len(payloads))
        if len(payloads) > FITS:
            raise MemoryError(f"{len(payloads)} payloads")
        return [2 * each["n"] for each in payloads]


def echo(payloads: list[Any]) -> list[Any]:
    return payloads


def sizes(payloads: list[Any]) -> list[int]:
    """How many payloads ran together."""
    return [len(payloads)] * len(payloads)


def collector(payloads: list[Any]) -> list[Any]:
    """How many objects the garbage collector passes over here, and after how many new ones it looks."""
    return [[gc.get_freeze_count(), gc.get_threshold()[0]]] * len(payloads)


def standard_input(payloads: list[Any]) -> list[str]:
    """What a program that a handler starts reads from standard input."""
    return [subprocess.run(["cat"], capture_output=True, text=True, check=True).stdout for _ in payloads]


DESCRIPTORS = "import os; print([os.readlink(each.path) for each in os.scandir('/proc/self/fd') if int(each.name) > 2])"


def inherited(payloads: list[Any]) -> list[str]:
    """The open files, but for the three standard ones, of a program that a handler starts without closing any."""
    command = [sys.executable, "-c", DESCRIPTORS]
    return [
        subprocess.run(command, capture_output=True, text=True, check=True, close_fds=False).stdout for _ in payloads
    ]


def terminated(payloads: list[Any]) -> list[int | None]:
    """How a forked process ends that is terminated, as those of a pool are."""
    return [_terminated() for _ in payloads]


def _terminated() -> int | None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_pause, args=(started,), daemon=True)
    process.start()
    started.wait()
    process.terminate()
    process.join()
    return process.exitcode


def _pause(started: Any) -> None:
    started.set()
    signal.pause()


def vectors(payloads: list[Any]) -> list[Any]:
    """[n, n] for each number or text of one; None for None."""
    return [each if each is None else np.full(2, float(each)) for each in payloads]


def _answer(payload: dict[str, Any], seen: Sequence[int]) -> object:
    match payload.get("do"):
        case "seen":
            return seen
        case "nan":
            return {"deep": [1.0, {"down": float("nan")}]}
        case "set":
            return {"stones"}
        case "cancelled":
            return asyncio.CancelledError("a stone in the mill")
        case "error":
            return ValueError("a stone in the mill")
        case _:
            # A payload that is changed is whole again where its batch is run a second time.
            return 2 * payload.pop("n")
