"""A process ends as a whole: a thread that fails takes it along, and says why."""

from __future__ import annotations

import threading

import pytest

from millstream.worker.life import Life, ThreadFailed


class Panic(BaseException):
    """As a library's Rust code raises where it panics: no Exception."""


@pytest.mark.parametrize("error", [RuntimeError("no memory"), Panic("no memory")])
def test_whatever_ends_a_thread_ends_the_process_and_is_named(error: BaseException) -> None:
    life = Life()

    def work() -> None:
        with life.guard():
            raise error

    thread = threading.Thread(target=work, name="claimer")
    thread.start()
    thread.join()

    assert life.draining
    with pytest.raises(ThreadFailed, match=f"claimer failed: {type(error).__name__}: no memory"):
        life.check()
