"""Encodes and decodes the bodies of jobs and the replies to them. Pure. Every decoder validates its input."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import repeat
from operator import add
from typing import Any, NoReturn, cast

import numpy as np

from millstream.broker.contract.entry_codec import MAX_MS
from millstream.broker.contract.errors import Malformed, MillstreamError, from_wire, to_wire
from millstream.broker.contract.job import Encoded, Json, Reply, Scalar
from millstream.broker.contract.scalars import plain
from millstream.broker.contract.stages import read_stages

MAX_DEPTH = 64
"""Deepest nesting of lists and objects in a body. Python's own limit differs by version and by thread."""

_MAX_NAME = 512
"""Most characters of a fingerprint or of a version in a reply."""

_FLOATS = np.dtype("<f4")
_DTYPES: Mapping[Json, np.dtype[Scalar]] = {"float32": _FLOATS, "float16": np.dtype("<f2"), "uint8": np.dtype("u1")}
"""Dtypes of vectors in a reply, by their name in its head."""
_NAMED: Mapping[object, str] = {dtype: str(name) for name, dtype in _DTYPES.items() if dtype != _FLOATS}
"""Names of the dtypes that a head must state. Vectors of any other dtype are sent as float32."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def _scalar(value: object) -> object:
    """Returns the Python value of a scalar of an array library, which `json` cannot encode. Raises TypeError."""
    held = plain(value)
    if held is value:
        raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
    return held


# Made once, not for each call. Text is not escaped, so redis-cli shows Chinese text as it is.
_body = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_scalar).encode
_value = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_quoted = json.encoder.encode_basestring


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not valid JSON")


_decoder = json.JSONDecoder(parse_constant=_refuse)
_decoded = _decoder.raw_decode
_ZEROS = bytes.maketrans(b"123456789E+", b"000000000ee")
_find_huge = re.compile(b"ee?000|0{300}").search
"""Finds a number that Python may read as infinite, in text whose digits _ZEROS has translated to 0."""


class JsonText(str):
    """A row of a request as JSON text, encoded when the call is made: its caller may change the value afterwards."""

    __slots__ = ()


def encode_value(value: object) -> JsonText:
    """Returns a row or a result as JSON text: valid Unicode, no NaN, nested at most MAX_DEPTH - 2 deep.

    Raises TypeError or ValueError if JSON cannot represent the value or it is nested more deeply.
    """
    try:
        text = _body(value)
        # A body or a reply adds two levels: an object and a list.
        deep = _is_deep(text.encode(), MAX_DEPTH - 2)
    except RecursionError:
        deep = True
    if deep:
        raise ValueError(f"nested more than {MAX_DEPTH - 2} deep")
    return JsonText(text)


def encode_inputs(inputs: Sequence[Json], options: Mapping[str, Json]) -> bytes:
    """Returns the body of a job as UTF-8 JSON. `inputs` are all values, or all JsonText.

    Raises UnicodeEncodeError if a text has a lone surrogate, TypeError or ValueError if JSON cannot represent a value,
    ValueError if the options are nested more than MAX_DEPTH deep.
    """
    if not options and {str}.issuperset(map(type, inputs)):
        # Nearly every body has this form. This takes half the time.
        return f'{{"inputs":[{",".join(map(_quoted, inputs))}]}}'.encode()  # type: ignore[arg-type]
    if inputs and {JsonText}.issuperset(map(type, inputs)):
        named = f',"options":{_body(options)}' if options else ""
        return f'{{"inputs":[{",".join(inputs)}]{named}}}'.encode()  # type: ignore[arg-type]
    encoded = _body({"inputs": inputs, "options": options} if options else {"inputs": inputs}).encode()
    if options and _is_deep(encoded):
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return encoded


def decode_inputs(body: bytes, rows: int) -> tuple[list[Json], dict[str, Json]]:
    """Returns the inputs of a body, one for each row, and its options.

    Raises Malformed if the body is not valid JSON, is nested more than MAX_DEPTH deep or does not have `rows` inputs.
    """
    if _is_deep(body):
        raise Malformed(f"body is nested more than {MAX_DEPTH} deep")
    decoded = _json(body)
    if not isinstance(decoded, dict):
        raise Malformed("body is not a JSON object")
    inputs, options = decoded.get("inputs"), decoded.get("options", {})
    if not isinstance(inputs, list) or not isinstance(options, dict):
        raise Malformed("body has no list `inputs` or no object `options`")
    if len(inputs) != rows or not inputs:
        raise Malformed(f"body has {len(inputs)} inputs, the entry says {rows} rows")
    return inputs, options


_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_OTHERS = bytes(set(range(256)) - set(b"[]{}"))


def _is_deep(text: bytes, most: int = MAX_DEPTH) -> bool:
    """Tells if JSON is nested deeper than `most`. Takes linear time, and does not recurse."""
    if text.count(b"[") + text.count(b"{") <= most:
        return False
    brackets = np.frombuffer(_TEXT.sub(b"", text).translate(_BRACKETS, _OTHERS), dtype=np.uint8)
    return bool(np.cumsum(np.where(brackets == ord("["), 1, -1), dtype=np.int32).max(initial=0) > most)


def _json(text: bytes) -> Json:
    try:
        string = text.decode()
        decoded, end = _decoded(string)
        if end < len(string):
            # `raw_decode` stops before trailing space, which JSON allows.
            decoded = _decoder.decode(string)
        if b"\\u" in text and _SURROGATE.search(text):
            # A lone surrogate cannot be encoded: neither the tokenizer nor the reply could take it.
            json.dumps(decoded, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {str(error)[:80]}") from None
    return cast(Json, decoded)


def origin_of(fingerprint: str, version: str = "") -> str:
    """Returns the part of a reply's head that names the weights and their version: equal in all replies of a worker.

    It is empty if both arguments are.
    """
    named = {"fingerprint": fingerprint, "version": version}
    return ",".join([f'"{name}":{_quoted(value[:_MAX_NAME])}' for name, value in named.items() if value])


def encode_reply(reply: Reply, origin: str = "") -> bytes:
    """Returns one line of JSON, then the vectors' little-endian bytes: float32 if the line has no `dtype`.

    `origin`, from `origin_of`, replaces the reply's own fingerprint and version.
    """
    # Built from pieces, which is faster than json.dumps: this runs for every job, and most replies have few fields.
    head = ['"v":1']
    if reply.error is not None:
        head.append(f'"error":{_value(to_wire(reply.error))}')
    if reply.errors:
        head.append(f'"errors":{_value({str(row): to_wire(error) for row, error in reply.errors.items()})}')
    if reply.values is not None:
        head.append(f'"values":{_value(reply.values)}')
    if reply.truncated:
        head.append(f'"truncated":{_value(reply.truncated)}')
    if reply.timings:
        timings = [f"{_quoted(name)}:{ms:.3f}" for name, ms in reply.timings.items()]
        head.append(f'"timings":{{{",".join(timings)}}}')
    head.append(f'"tokens":{reply.tokens}')
    if origin or reply.fingerprint or reply.version:
        head.append(origin or origin_of(reply.fingerprint, reply.version))
    if reply.stages:
        worker, *numbers = reply.stages
        head.append(f'"stages":[{_quoted(worker)},{",".join(map(str, numbers))}]')
    data = b""
    if reply.vectors is not None:
        rows, dim = reply.vectors.shape
        head.append(f'"shape":[{rows},{dim}]')
        name = _NAMED.get(reply.vectors.dtype, "float32")
        if name != "float32":
            head.append(f'"dtype":"{name}"')
        data = np.asarray(reply.vectors, _DTYPES[name]).tobytes()
    return f"{{{','.join(head)}}}\n".encode() + data


def decode_reply(blob: bytes) -> Reply:
    """Returns the reply that `encode_reply` wrote. Its vectors are a read-only view of `blob`.

    Ignores fields of newer workers. Numbers in `values` are finite; the caller checks those of the vectors.
    Raises Malformed.
    """
    line, _, data = blob.partition(b"\n")
    head = _json(line)
    if not isinstance(head, dict):
        raise Malformed("reply has no head")
    try:
        reply = _reply(head, data)
        if reply.values and _has_huge(line):
            _value(reply.values)
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise Malformed(f"reply: {error}") from None
    return reply


def _has_huge(text: bytes) -> bool:
    """Tells if JSON may have a number beyond the range of a float. Fast; a True may be wrong, a False is not."""
    return _find_huge(text.translate(_ZEROS)) is not None


def _reply(head: dict[str, Any], data: bytes) -> Reply:
    """Returns the reply of a head and its vectors' bytes. A malformed head raises one of the errors that `decode_reply`
    catches.
    """
    if head.get("v", 1) != 1:
        raise ValueError(f"its version is {str(head['v'])[:20]}, this client reads version 1: update the client")
    if "shape" in head and "values" in head:
        raise ValueError("both vectors and values")
    # `+ 0.0` raises TypeError if a timing is not a number. `map` and `zip` are fast: this runs for every job.
    given = head.get("timings", {})
    timings = dict(zip(given, map(add, given.values(), repeat(0.0)), strict=True))
    values = head.get("values")
    if values is not None and not isinstance(values, list):
        raise ValueError("values is not a list")
    tokens, fingerprint, version = head.get("tokens", 0), head.get("fingerprint", ""), head.get("version", "")
    if type(tokens) is not int or not 0 <= tokens < MAX_MS:
        raise ValueError(f"tokens is not a whole number from 0 to {MAX_MS - 1}")
    if not (isinstance(fingerprint, str) and isinstance(version, str)):
        raise ValueError("fingerprint or version is not a string")
    if len(fingerprint) > _MAX_NAME or len(version) > _MAX_NAME:
        raise ValueError(f"fingerprint or version has more than {_MAX_NAME} characters")
    return Reply(
        _vectors(head["shape"], head.get("dtype", "float32"), data) if "shape" in head else None,
        values,
        _errors(head["errors"]) if "errors" in head else {},
        from_wire(head["error"]) if "error" in head else None,
        tokens,
        tuple(map(_row, head["truncated"])) if "truncated" in head else (),
        timings,
        fingerprint,
        version,
        read_stages(head["stages"]) if "stages" in head else None,
    )


def _vectors(shape: list[int], dtype: str, data: bytes) -> Encoded:
    rows, dim = shape
    if dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype}")
    if rows < 0 or dim < 0:
        # reshape would infer a dimension of -1.
        raise ValueError(f"negative shape {rows} x {dim}")
    return np.frombuffer(data, _DTYPES[dtype]).reshape(rows, dim)


def _row(index: int | str) -> int:
    if int(index) < 0:
        raise ValueError(f"row {index} is negative")
    return int(index)


def _errors(wire: dict[str, dict[str, object]]) -> dict[int, MillstreamError]:
    return {_row(row): from_wire(error) for row, error in wire.items()}
