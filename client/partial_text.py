"""Text so far of a running job, as the server has it."""

from __future__ import annotations

from typing import Protocol

from millstream.broker.contract.errors import Malformed
from millstream.broker.contract.partial import Delta, decode_records, text_of


class Partials(Protocol):
    """Part of Streams that is needed."""

    def partial_behind(self, job_id: str, size: int) -> bytes: ...


class PartialText:
    """Reads the text of one job, each time what was added since the last time: a long text has thousands of records."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._bytes = self._characters = 0

    def read(self, streams: Partials) -> Delta:
        """Returns the text that is new. Raises Malformed if it cannot be read; the next read is from the beginning."""
        records = streams.partial_behind(self._job_id, self._bytes)
        try:
            delta = Delta(self._characters, text_of(decode_records(records)))
        except Malformed:
            # The server may have lost records, and have others now.
            self._bytes = self._characters = 0
            raise
        self._bytes += len(records)
        self._characters += len(delta.text)
        return delta
