"""Rows of a call: copied, encoded, measured, and split into jobs."""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
from typing import cast

import numpy as np

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.codec import JsonText, encode_value
from millstream.broker.contract.entry_codec import MAX_ROWS
from millstream.broker.contract.errors import InputTooLong, InvalidRequest, MillstreamError
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import Operation
from millstream.broker.contract.prompt import Prompt
from millstream.client.call_options import CallOptions
from millstream.client.split import Part, estimate_tokens, split, split_evenly, split_once

MAX_ROW_BYTES = 512 * 1024
"""Bytes that one row may have at most, with those that the model reads beside it."""

_TEXTS, _LISTS = (str, bytes), (list, Sequence, np.ndarray)


def copy_arguments(inputs: Sequence[Json], opts: CallOptions) -> tuple[Sequence[Json], CallOptions]:
    """Returns copies of a caller's inputs and options, which it may change while its call waits for the server.

    Inputs that are not a list are returned as they are.
    """
    if not _is_list(inputs):
        return inputs, opts
    rows = [row if isinstance(row, str) else _copy_row(row) for row in inputs]
    return rows, opts._replace(options=copy.deepcopy(dict(opts.options))) if opts.options else opts


def _copy_row(row: Json) -> Json:
    try:
        return copy.deepcopy(row)
    except Exception:  # noqa: BLE001 - a row that cannot be copied is not JSON, and becomes its row's error
        return row


def split_rows(
    spec: ServiceSpec, inputs: Sequence[object], hits: Container[int] = (), beside: int = 0
) -> tuple[list[Part], dict[int, MillstreamError]]:
    """Splits a call into jobs, without the rows of `hits`. Returns the parts, and the errors of rows that are not sent.

    A bad row does not affect other rows. If the service has a cache, equal texts are sent once. `beside` is as in
    measure_rows.
    """
    sizes, refused = measure_rows(inputs, beside)
    operation = spec.model.operation
    rows, most_tokens = min(spec.runtime.batch_size, MAX_ROWS), spec.runtime.batch_tokens
    if operation.streams:
        rows = 1
    if operation.even_cost:
        return split_evenly(sizes, rows, spec.runtime.row_tokens), refused
    if not spec.runtime.enable_cache:
        return split(sizes, rows, most_tokens), refused
    misses = {row: size for row, size in sizes.items() if row not in hits}
    return split_once(misses, inputs, rows, most_tokens), refused


def estimate_row_tokens(spec: ServiceSpec, sizes: Sequence[int]) -> int:
    """Estimates how many tokens rows of these sizes, UTF-8 bytes, have for the model of `spec`."""
    if spec.model.operation.even_cost:
        return spec.runtime.row_tokens * len(sizes)
    return sum(map(estimate_tokens, sizes))


def encode_rows(operation: Operation, inputs: Sequence[Json]) -> Sequence[Json]:
    """Returns the rows to send. Payloads and prompts are encoded as JSON now, so the caller may change them later.

    A payload that is not JSON, or a prompt that is not valid, becomes its row's error. Raises InvalidRequest if
    `inputs` are payloads or prompts, but not a list.
    """
    if operation.row == "text":
        return inputs
    if not _is_list(inputs):
        raise InvalidRequest(
            f"a list of {operation.row}s is needed, not {type(inputs).__name__}", hint="`call` takes a single one"
        )
    encode = _encode_prompt if operation.row == "prompt" else _encode_payload
    return cast(Sequence[Json], [encode(each) for each in inputs])


def _is_list(inputs: object) -> bool:
    """Returns whether `inputs` has rows. An array without a dimension has none."""
    return isinstance(inputs, _LISTS) and not isinstance(inputs, _TEXTS) and getattr(inputs, "ndim", 1) > 0


def _encode_prompt(prompt: Json) -> JsonText | InvalidRequest:
    try:
        return _encode_payload(Prompt.read(prompt).json())
    except InvalidRequest as error:
        return error


def _encode_payload(payload: object) -> JsonText | InvalidRequest:
    try:
        return encode_value(payload)
    except (TypeError, ValueError) as error:
        return InvalidRequest(f"not a JSON value: {error}"[:500], hint="convert it first")


def measure_rows(inputs: Sequence[object], beside: int = 0) -> tuple[dict[int, int], dict[int, MillstreamError]]:
    """Returns the size in UTF-8 bytes of each good row, and the error of each bad row.

    `beside` is the number of bytes that the model reads with each row, such as a reranker's query. Raises
    InvalidRequest if `inputs` is not a list.
    """
    if not _is_list(inputs):
        raise InvalidRequest(f"a list of strings is needed, not {type(inputs).__name__}")
    sizes: dict[int, int] = {}
    refused: dict[int, MillstreamError] = {}
    for row, text in enumerate(inputs):
        size = _measure(text, beside)
        if isinstance(size, int):
            sizes[row] = size
        else:
            refused[row] = size
    return sizes, refused


def _measure(text: object, beside: int) -> int | MillstreamError:
    """Returns the size in UTF-8 bytes of a text or an encoded row, plus `beside`; an error if it cannot be sent."""
    if not isinstance(text, str):
        if isinstance(text, MillstreamError):
            return text
        return InvalidRequest(f"not a string but {type(text).__name__}", hint="convert it first")
    try:
        size = len(text.encode()) + beside
    except UnicodeEncodeError as error:
        return InvalidRequest(f"not valid Unicode: {error.reason} at character {error.start}")
    if size > MAX_ROW_BYTES:
        return InputTooLong(f"{size} bytes, at most {MAX_ROW_BYTES} travel in one row", hint="shorten it")
    return size
