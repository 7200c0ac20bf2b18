"""What a client sends to a custom service: any JSON, encoded when the call is made, and refused row by row."""

from __future__ import annotations

import json
from typing import cast

import numpy as np
import pytest

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.codec import MAX_DEPTH, JsonText, decode_inputs, encode_inputs, encode_value
from millstream.broker.contract.entry_codec import MAX_ROWS
from millstream.broker.contract.errors import InputTooLong, InvalidRequest
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import CALL, EMBED, ModelType
from millstream.client.rows import MAX_ROW_BYTES, encode_rows, split_rows
from millstream.client.split import MAX_PART_BYTES


def spec(kind: ModelType = "custom", **runtime: object) -> ServiceSpec:
    limits = Runtime.model_validate(runtime)
    return ServiceSpec(name="mill", model=ModelSpec(type=kind, model_name="m"), model_ref="m", runtime=limits)


def rows(*payloads: object) -> list[Json]:
    return list(encode_rows(CALL, cast(list[Json], payloads)))


def nested(depth: int) -> object:
    value: object = "core"
    for _ in range(depth):
        value = [value]
    return value


PAYLOADS: list[object] = ["text", '水车\u2028"\\', 1, 0.5, None, True, {"a": [1, {"b": None}]}, [], {}]


def test_a_body_holds_the_payloads_as_they_were_given() -> None:
    body = encode_inputs(rows(*PAYLOADS), {})

    assert json.loads(body) == {"inputs": PAYLOADS}
    assert decode_inputs(body, len(PAYLOADS)) == (PAYLOADS, {})
    assert json.loads(encode_inputs([JsonText("1")], {"a": 2})) == {"inputs": [1], "options": {"a": 2}}


def test_the_deepest_payload_that_travels_is_the_deepest_that_is_read() -> None:
    deepest = nested(MAX_DEPTH - 2)

    assert decode_inputs(encode_inputs(rows(deepest), {}), 1) == ([deepest], {})
    with pytest.raises(ValueError, match="nested"):
        encode_value([deepest])


UNSENDABLE = {
    "object": object(),
    "set": {1, 2},
    "bytes": b"bytes",
    "nan": float("nan"),
    "infinity within": [float("inf")],
    "half a character": "\ud800",
    "half a character in a key": {"\udfff": 1},
    "too deep": nested(5_000),
    "huge number": 10**5_000,
    "key": {(1, 2): 3},
    "array": np.zeros(2),
}


@pytest.mark.parametrize("bad", UNSENDABLE.values(), ids=UNSENDABLE)
def test_what_json_cannot_carry_is_its_rows_error(bad: object) -> None:
    parts, refused = split_rows(spec(), rows("a", bad, "b"))

    assert [part.rows for part in parts] == [(0, 2)]
    assert {row: type(error) for row, error in refused.items()} == {1: InvalidRequest}


def test_a_payload_of_too_many_bytes_is_its_rows_error() -> None:
    parts, refused = split_rows(spec(), rows({"a": "x" * MAX_ROW_BYTES}, {"a": "x" * (MAX_ROW_BYTES - 100)}))

    assert [part.rows for part in parts] == [(1,)]
    assert isinstance(refused[0], InputTooLong)


@pytest.mark.parametrize("inputs", ["text", b"bytes", {"a": 1}, 5, None])
def test_payloads_are_a_list(inputs: object) -> None:
    with pytest.raises(InvalidRequest, match="a list of payloads is needed"):
        encode_rows(CALL, cast(list[Json], inputs))


def test_options_are_not_for_custom_services() -> None:
    with pytest.raises(InvalidRequest, match="takes no options"):
        CALL.check({"truncate": "end"})


def test_texts_for_other_services_are_taken_as_they_are_and_what_is_none_is_refused() -> None:
    texts: list[Json] = ["a", {"b": 1}, "c"]

    assert encode_rows(EMBED, texts) is texts
    parts, refused = split_rows(spec("embedding"), texts)
    assert ([part.rows for part in parts], list(refused)) == ([(0, 2)], [1])


def test_a_payload_counts_the_same_whatever_its_size_and_jobs_hold_a_batch() -> None:
    payloads = [{"n": n, "text": "x" * (97 * n % 4_000)} for n in range(200)]

    parts, _ = split_rows(spec(batch_size=64), rows(*payloads))

    assert sorted(row for part in parts for row in part.rows) == list(range(200))
    assert [(len(part.rows), part.tokens) for part in parts] == [(64, 2_048)] * 3 + [(8, 256)]
    assert split_rows(spec(), []) == ([], {})
    assert len(split_rows(spec(batch_size=2 * MAX_ROWS), rows(*range(MAX_ROWS + 1)))[0]) == 2


def test_jobs_of_large_payloads_stay_small() -> None:
    parts, _ = split_rows(spec(batch_size=64), rows(*["x" * 100_000] * 20))

    assert max(len(part.rows) for part in parts) == MAX_PART_BYTES // 100_002
