"""Results of calls: an array or a list, with the tokens and the time that the call took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, cast

import numpy as np

from millstream.broker.contract.errors import InvalidRequest, Malformed, ModelFailed
from millstream.broker.contract.generation import Generation
from millstream.broker.contract.job import Encoded, Json
from millstream.client.generate import Generated

Timings = Mapping[str, float]


class Embeddings(np.ndarray[Any, np.dtype[Any]]):
    """Array of vectors, float32 [texts, dim], or [dim] for a single text; other encodings give float16 or uint8.

    uint8 holds one bit for each number of a vector. `usage["tokens"]` counts the tokens that the model ran, special
    tokens included; `truncated` lists the texts that were cut; `timings` is in ms: `queue` and `inference` of the
    slowest job, `total` of the whole call. `fingerprint` identifies the weights that made all vectors: vectors of
    different fingerprints must not be compared. It is empty if a worker did not report it. `version` is the version of
    the route that made all vectors, empty without a route.
    """

    usage: Mapping[str, int] = MappingProxyType({})
    truncated: tuple[int, ...] = ()
    timings: Timings = MappingProxyType({})
    fingerprint: str = ""
    version: str = ""

    @classmethod
    def of(
        cls, vectors: Encoded, tokens: int, truncated: tuple[int, ...], timings: Timings, fingerprint: str = ""
    ) -> Embeddings:
        array = vectors.view(cls)
        array.usage, array.truncated, array.timings = {"tokens": tokens}, truncated, timings
        array.fingerprint = fingerprint
        return array

    def __array_finalize__(self, origin: object) -> None:
        if isinstance(origin, Embeddings):
            self.usage, self.truncated, self.timings = origin.usage, origin.truncated, origin.timings
            self.fingerprint, self.version = origin.fingerprint, origin.version


class Values(list[Json]):
    """List of one result per row: a JSON value, such as a reranker's score, or Generated if the row is a prompt.

    Has the other attributes of Embeddings.
    """

    usage: Mapping[str, int] = MappingProxyType({})
    truncated: tuple[int, ...] = ()
    timings: Timings = MappingProxyType({})
    fingerprint: str = ""
    version: str = ""

    @classmethod
    def of(
        cls, values: Iterable[Json], tokens: int, truncated: tuple[int, ...], timings: Timings, fingerprint: str = ""
    ) -> Values:
        result = cls(values)
        result.usage, result.truncated, result.timings = {"tokens": tokens}, truncated, timings
        result.fingerprint = fingerprint
        return result


def name_version(result: Embeddings | list[Json], version: str) -> Embeddings | list[Json]:
    """Returns the result of a call with the version of its route; `version` is "" without a route."""
    if version and isinstance(result, Embeddings):
        result.version = version
    elif version and isinstance(result, Values):
        result.version = version
        result[:] = [_versioned(each, version) for each in cast(list[object], result)]
    return result


def _versioned(row: object, version: str) -> Json:
    return cast(Json, replace(row, version=version) if isinstance(row, Generated) else row)


def generations(result: Embeddings | list[Json]) -> list[Generated]:
    """Returns the texts of a call's rows. Raises ModelFailed if a row's result has another shape."""
    if not isinstance(result, Values):
        raise ModelFailed("its reply is not a text: vectors", hint="client and worker of different versions?")
    found = [each if isinstance(each, Generated) else _read(each, result) for each in cast(list[object], result)]
    return [each.timed(result.timings) for each in found]


def _read(value: object, result: Values) -> Generated:
    text = Generated.of(read_generation(value), result.fingerprint, result.timings)
    return replace(text, version=result.version) if result.version else text


def read_generation(value: object) -> Generation:
    """Returns the text of a row's result. Raises ModelFailed if the result has another shape."""
    try:
        return Generation.read(cast(Json, value))
    except Malformed as error:
        raise ModelFailed(
            f"its reply is not a text: {error}", hint="client and worker of different versions?"
        ) from error


def to_vectors(result: Embeddings | list[Json], single: bool) -> Embeddings:
    """Returns a call's result as `embed` does: [rows, dim], [0, 0] for no rows, [dim] for a single text.

    Raises InvalidRequest if the model answers other values than dense vectors.
    """
    if not isinstance(result, Embeddings):
        if result:
            raise InvalidRequest(
                "this service answers values, not dense vectors",
                hint="client.submit(SERVICE, texts).result() is a list of them",
            )
        return Embeddings.of(np.zeros((0, 0), dtype=np.float32), 0, (), {})
    return result[0].view(Embeddings) if single else result
