"""A model that answers its input. No torch: for tests of the queue and for measuring it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from millstream.broker.errors import InputTooLong, InvalidRequest, MillstreamError
from millstream.broker.job import Json
from millstream.worker.models.base import Prepared


class EchoModel:
    """Answers each row with itself; a token is a word. `model_name: "sleep:0.05"` makes each forward take 0.05 s."""

    op = "echo"

    def __init__(self, model_name: str = "", max_length: int | None = None) -> None:
        kind, _, seconds = model_name.partition(":")
        self._sleep_s = float(seconds) if kind == "sleep" else 0.0
        self._max_length = max_length
        self.fingerprint = f"echo:{model_name}"

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        return [self._row(value) for value in inputs]

    def _row(self, value: Json) -> Prepared | MillstreamError:
        if not isinstance(value, str):
            return InvalidRequest(f"not a string but {type(value).__name__}")
        tokens = max(1, value.count(" ") + 1)
        if self._max_length is not None and tokens > self._max_length:
            return InputTooLong(f"{tokens} tokens, the model reads {self._max_length}", hint="truncate: end")
        return Prepared(tokens, value)

    def forward(self, rows: Sequence[Prepared]) -> list[Json]:
        if self._sleep_s:
            time.sleep(self._sleep_s)
        return [str(row.features) for row in rows]

    def samples(self, tokens: int) -> Sequence[Json]:
        return ["word " * (tokens - 1) + "word"]
