"""Plan of a bulk run: what its caller asked for, and the header that the manifest stores of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Json
from millstream.client.bulk.manifest import Header
from millstream.client.bulk.opening import InputFormat
from millstream.client.bulk.sinks import OutputFormat
from millstream.client.bulk.sources import Source
from millstream.client.call_options import CallOptions

STDIN = "-"
"""Name of an input that is standard input."""

SHARD_ROWS, SHARD_TEXTS = 2_048, 256
"""Rows of a shard by default: of texts to compute in batches, and of texts to generate, which take longer."""

GROUP_SHARDS = 4
"""Shards whose rows are sorted by length together. Texts to generate are not sorted: slots need no like lengths."""

WINDOW = 8_192
"""Rows in flight at most by default."""

_NO_EFFECT = {"device", "devices", "warmup", "priority", "url", "url_env"}
"""Settings of a model that do not change its results."""


@dataclass(frozen=True, slots=True)
class BulkPlan:
    """Arguments of a bulk run. `input` is STDIN for standard input. `opts` are those of its calls.

    `shard_rows` is the number of rows of a shard, None for the default; `window` is the number of rows in flight.
    `part` "2/8" means every eighth shard, from the second one on.
    """

    service: str
    input: str
    output: Path
    opts: CallOptions
    input_format: InputFormat = "auto"
    output_format: OutputFormat = "jsonl"
    column: str | None = None
    id_column: str | None = None
    shard_rows: int | None = None
    window: int = WINDOW
    part: str = "1/1"

    @property
    def every(self) -> tuple[int, int]:
        """Number of the first shard of the run, and the distance between two. Raises InvalidRequest."""
        match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", self.part) if isinstance(self.part, str) else None
        if match is None or int(match[1]) > int(match[2]):
            raise InvalidRequest(f"part={self.part!r} is not a part such as 2/8")
        return int(match[1]) - 1, int(match[2])

    def has(self, shard: int) -> bool:
        """Returns whether the shard with this number belongs to the run."""
        first, step = self.every
        return shard % step == first

    def check(self) -> None:
        """Raises InvalidRequest if a number is wrong, or arguments do not fit together."""
        for name, value in (("shard_rows", self.shard_rows), ("window", self.window)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InvalidRequest(f"{name}={value!r} is not a number of rows above 0")
        self.has(0)
        if self.input_format == "openai" and self.opts.options:
            name = next(iter(self.opts.options))
            raise InvalidRequest(
                f"the option {name!r} has no effect on requests in OpenAI's shape", hint="each body has its own options"
            )
        if self.output_format == "openai" and self.input_format != "openai":
            raise InvalidRequest(
                "the format openai is for answers to requests in OpenAI's shape",
                hint="give --input-format openai (input_format=), or another format",
            )

    def rows_of_shard(self, spec: ServiceSpec) -> int:
        """Returns the number of rows of a shard."""
        return self.shard_rows or (SHARD_TEXTS if spec.model.operation.streams else SHARD_ROWS)

    def shards_of_group(self, spec: ServiceSpec) -> int:
        """Returns the number of shards whose rows are sorted together."""
        return 1 if spec.model.operation.streams else GROUP_SHARDS

    def describe(self, spec: ServiceSpec, source: Source) -> Header:
        """Returns the header of a new run with this plan."""
        layout: Mapping[str, Json] = {
            "format": self.output_format,
            "input_format": self.input_format,
            "column": self.column,
            "id_column": self.id_column,
            "shard_rows": self.rows_of_shard(spec),
            "part": self.part,
        }
        model = cast(dict[str, Json], spec.model.model_dump(mode="json", exclude_defaults=True, exclude=_NO_EFFECT))
        options = dict(self.opts.options)
        path = "" if self.input == STDIN else str(Path(self.input).absolute())
        return Header(source.identify(), spec.name, {**model, "ref": spec.model_ref}, options, layout, source=path)
