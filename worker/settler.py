"""Thread: encodes answers and settles them, many jobs a round trip. Keeps them through a server's absence."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from millstream.broker.codec import encode_reply, origin_of
from millstream.broker.connection import retrying
from millstream.broker.errors import ModelFailed
from millstream.broker.job import Address, Reply
from millstream.broker.streams import MAX_BYTES_PER_CALL, MAX_JOBS_PER_CALL, Settlement, Streams
from millstream.worker.shared import Shared

log = logging.getLogger(__name__)


class Finished(NamedTuple):
    """A job's answer, on its way out; `bury` is the reason where it goes to the dead letters.

    `digests` has a name for each row, under which its answer is kept; none where it is not to be.
    """

    address: Address
    reply: Reply
    bury: str = ""
    digests: Sequence[str] = ()


class Settler(threading.Thread):
    """Writes what is `put`, until `finish`; nothing put is dropped while the process lives."""

    def __init__(
        self,
        shared: Shared,
        streams: Streams,
        keep: Callable[[Sequence[Finished]], None] = lambda finished: None,
        fingerprint: str = "",
    ) -> None:
        super().__init__(name="settler", daemon=True)
        self._origin = origin_of(fingerprint)
        self._streams = streams
        self._keep = keep
        self._window = shared.window
        self._counters = shared.counters
        self._life = shared.life
        self._queue: queue.SimpleQueue[Finished | None] = queue.SimpleQueue()

    def put(self, finished: Finished) -> None:
        self._queue.put(finished)

    def finish(self) -> None:
        """Settle what was put so far, then end."""
        self._queue.put(None)

    def run(self) -> None:
        with self._life.guard():
            ended = False
            while not ended and (first := self._queue.get()) is not None:
                ended = self._settle(first)

    def _settle(self, first: Finished) -> bool:
        """Settle `first` and what else is ready. True when the end was reached."""
        batch, to_keep = [_encoded(first, self._origin)], [first]
        size, ended = len(batch[0].reply), False
        while len(batch) < MAX_JOBS_PER_CALL and size < MAX_BYTES_PER_CALL:
            try:
                finished = self._queue.get_nowait()
            except queue.Empty:
                break
            if finished is None:
                ended = True
                break
            batch.append(_encoded(finished, self._origin))
            to_keep.append(finished)
            size += len(batch[-1].reply)
        # First: whoever has this answer and asks again finds it.
        self._keep(to_keep)
        self._write(batch)
        return ended

    def _write(self, batch: list[Settlement]) -> None:
        # Settling again what was settled changes nothing, so a cut connection is simply tried again.
        outcomes = retrying(lambda: self._streams.settle(batch), until=None, stop=None)
        for settlement, outcome in zip(batch, outcomes, strict=True):
            if outcome == "late":
                self._counters.late += 1
            elif outcome == "unwritable":
                log.error("job %s: its reply could not be written; it is among the dead letters", settlement.address)
            else:
                self._counters.jobs += 1
        self._window.forget([settlement.address.name for settlement in batch])


def _encoded(finished: Finished, origin: str) -> Settlement:
    try:
        reply = encode_reply(finished.reply, origin)
    except (TypeError, ValueError, RecursionError) as error:
        # What JSON cannot carry is one job's fault, not the end of the process and of all it holds.
        reply = encode_reply(Reply(error=ModelFailed(f"the answer cannot be sent: {type(error).__name__}")))
    return Settlement(finished.address, reply, finished.bury)
