"""Options of a call to an embedding service. Pure: clients validate them, workers apply them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.options import Rule, check_options, one_of

if TYPE_CHECKING:
    from millstream.broker.contract.job import Json

Truncate = Literal["none", "start", "end"]
InputType = Literal["query", "document", "none"]
Encoding = Literal["float32", "float16", "binary"]

MAX_PROMPT = 16_384
"""Most characters of a prompt: each job carries it, and the model reads it with each text."""


class EmbedOptions(NamedTuple):
    """The options of one call. None means the default of the service or the model.

    `input_type` selects the model's own prompt and route for queries or documents; `prompt` is text to put before each
    input instead. `dimensions`: vectors are cut to their first so many numbers. `normalize`: True gives unit vectors,
    False leaves cut vectors as they are.
    """

    truncate: Truncate | None = None
    input_type: InputType | None = None
    prompt: str | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    encoding: Encoding = "float32"

    @classmethod
    def read(cls, options: Mapping[str, Json]) -> EmbedOptions:
        """Returns the options of a call's JSON. Raises InvalidRequest if a name is unknown or a value is not valid."""
        check_options(options, _RULES, "an embedding service")
        given = {name: value for name, value in options.items() if value is not None}
        if "prompt" in given and "input_type" in given:
            raise InvalidRequest(
                "both a prompt and an input_type", hint="an input_type is the model's own prompt: leave one of them out"
            )
        return cls(**cast(dict[str, str], given))  # type: ignore[arg-type]

    def json(self) -> dict[str, Json]:
        """Returns the options as `read` takes them, without those that have their default value."""
        if self == _NONE:
            return {}
        return {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}

    def unit(self, model_gives_units: bool) -> bool:
        """Tells if vectors are to be normalized: on request, or if the model gives unit vectors and they are cut."""
        return self.normalize or (self.normalize is None and self.dimensions is not None and model_gives_units)


_NONE = EmbedOptions()

_RULES: Mapping[str, Rule] = {
    "truncate": one_of(Truncate),
    "input_type": one_of(InputType),
    "prompt": (
        lambda value: isinstance(value, str) and len(value) <= MAX_PROMPT,
        f"a string of at most {MAX_PROMPT} characters",
    ),
    "dimensions": (
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0,
        "a whole number above 0",
    ),
    "normalize": (lambda value: isinstance(value, bool), "True or False"),
    "encoding": one_of(Encoding),
}
