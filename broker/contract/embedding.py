"""What may be asked of an embedding service beside its texts. Pure: clients refuse by it, workers act by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, cast, get_args

import numpy as np

from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Encoded, Json, Vectors

Truncate = Literal["none", "start", "end"]
InputType = Literal["query", "document", "none"]
Encoding = Literal["float32", "float16", "binary"]

MAX_PROMPT = 16_384
"""Characters. It travels with each job, and runs with each text."""

_LEAST_NORM = 1e-12


class EmbedOptions(NamedTuple):
    """The options of one call; None, for each, is what the service or the model does by itself.

    `input_type` takes the model's own prompt and route for queries or documents, `prompt` is put before each text
    instead. `dimensions` are kept of each vector. `normalize` True gives unit vectors; False leaves what was cut as it
    is.
    """

    truncate: Truncate | None = None
    input_type: InputType | None = None
    prompt: str | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    encoding: Encoding = "float32"

    @classmethod
    def read(cls, options: Mapping[str, Json]) -> EmbedOptions:
        """The options of a call's JSON. Raises InvalidRequest for a name or a value that is none of them."""
        for name, value in options.items():
            if name not in _VALID:
                raise InvalidRequest(f"no option {name!r}", hint=f"an embedding service has {', '.join(_VALID)}")
            valid, wanted = _VALID[name]
            if value is not None and not valid(value):
                raise InvalidRequest(f"{name}={str(value)[:80]!r}", hint=wanted)
        given = {name: value for name, value in options.items() if value is not None}
        if "prompt" in given and "input_type" in given:
            raise InvalidRequest(
                "both a prompt and an input_type", hint="an input_type is the model's own prompt: leave one of them out"
            )
        return cls(**cast(dict[str, str], given))  # type: ignore[arg-type]

    def json(self) -> dict[str, Json]:
        """What `read` reads, without what nobody asked for."""
        if self == _NONE:
            return {}
        return {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}

    def unit(self, model_gives_units: bool) -> bool:
        """Whether what the model gives is to be made unit vectors: where that is asked, or a cut undid it."""
        return self.normalize or (self.normalize is None and self.dimensions is not None and model_gives_units)


_NONE = EmbedOptions()


def _one_of(choices: object) -> tuple[Callable[[Json], bool], str]:
    names = get_args(choices)
    return lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}"


_VALID: Mapping[str, tuple[Callable[[Json], bool], str]] = {
    "truncate": _one_of(Truncate),
    "input_type": _one_of(InputType),
    "prompt": (
        lambda value: isinstance(value, str) and len(value) <= MAX_PROMPT,
        f"a string of at most {MAX_PROMPT} characters",
    ),
    "dimensions": (
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0,
        "a whole number above 0",
    ),
    "normalize": (lambda value: isinstance(value, bool), "True or False"),
    "encoding": _one_of(Encoding),
}


def shaped(vectors: Vectors, dimensions: int | None, normalize: bool, encoding: Encoding) -> Encoded:
    """`vectors`, float32 [rows, dim], cut to `dimensions`, made unit vectors where asked, and encoded.

    float32 and float16 [rows, dimensions]; for "binary" uint8 [rows, ceil(dimensions / 8)]: a bit each, set where the
    number is above zero, the first in the highest bit.
    """
    cut = vectors[:, :dimensions]
    if encoding == "binary":
        return np.packbits(cut > 0, axis=-1)
    # Whoever looks for infinity afterwards finds what a float16 cannot hold.
    with np.errstate(over="ignore", invalid="ignore"):
        if normalize:
            cut = cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), _LEAST_NORM)
        return cut.astype(np.float16) if encoding == "float16" else cut
