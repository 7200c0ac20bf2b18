"""The result of a job of an operation that streams, as the one value of its reply."""

from __future__ import annotations

from typing import NamedTuple

from millstream.broker.contract.errors import Malformed
from millstream.broker.contract.job import Json

MAX_REASON = 64
"""Most characters of a finish reason."""


class Generation(NamedTuple):
    """The whole text of a job, and the reason for its end, such as "stop" or "length"."""

    text: str
    finish_reason: str

    @classmethod
    def read(cls, value: Json) -> Generation:
        """Returns the result of a reply's value. Raises Malformed if it has another shape.

        Other fields are ignored: newer workers may add some.
        """
        if not isinstance(value, dict):
            raise Malformed(f"a result of type {type(value).__name__} in place of a text and its finish reason")
        text, reason = value.get("text"), value.get("finish_reason")
        if not isinstance(text, str):
            raise Malformed("a result without a text")
        if not (isinstance(reason, str) and 0 < len(reason) <= MAX_REASON):
            raise Malformed("a result without a finish reason")
        return cls(text, reason)

    def json(self) -> dict[str, Json]:
        """Returns the result as `read` takes it."""
        return {"text": self.text, "finish_reason": self.finish_reason}
