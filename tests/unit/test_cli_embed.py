"""What `millstream embed` makes of its input and its vectors."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Json, Vectors
from millstream.cli.embed import encode, parse_json

VECTORS = arrays(np.float32, (3, 4), elements=st.floats(-2, 2, width=32))


@given(VECTORS)
def test_the_printed_numbers_give_the_same_float32_back(vectors: Vectors) -> None:
    lines = [json.loads(piece) for piece in encode("json", list(vectors))]
    texts = [piece.split() for piece in encode("text", list(vectors))]

    np.testing.assert_array_equal(np.array([line["embedding"] for line in lines], np.float32), vectors)
    np.testing.assert_array_equal(np.array(texts, np.float32), vectors)
    assert [line["index"] for line in lines] == [0, 1, 2]


def test_a_text_that_failed_has_no_json_line_an_empty_line_or_a_row_of_nan() -> None:
    row = np.ones(2, np.float32)

    assert [json.loads(piece)["index"] for piece in encode("json", [row, None, row])] == [0, 2]
    assert b"".join(encode("text", [row, None, row])) == b"1.0 1.0\n\n1.0 1.0\n"
    array = np.load(io.BytesIO(b"".join(encode("npy", [row, None, row]))))
    np.testing.assert_array_equal(array, [[1, 1], [np.nan, np.nan], [1, 1]])


def test_a_sparse_vector_is_an_object() -> None:
    sparse: dict[str, Json] = {"indices": [3, 7], "values": [0.5, 1.0]}

    assert b"".join(encode("json", [sparse, None])) == (
        b'{"index":0,"embedding":{"indices":[3,7],"values":[0.5,1.0]}}\n'
    )


def test_no_text_gives_no_line_and_an_empty_array() -> None:
    assert list(encode("json", [])) == []
    assert np.load(io.BytesIO(b"".join(encode("npy", [])))).shape == (0, 0)


@pytest.mark.parametrize("text", ['["a", "水"]', ' [\n"a",\n"水"]\n', '"a"\n"水"\n', '"a"\r\n\n"水"'])
def test_json_is_an_array_or_a_string_a_line(text: str) -> None:
    assert parse_json(text) == ["a", "水"]


def test_every_text_that_is_no_string_is_named_by_its_index() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json('["a", null, {"水": 1}, "b"]')

    assert str(caught.value).splitlines() == [
        "text 1: not a string but null",
        'text 2: not a string but {"水": 1}',
    ]


@pytest.mark.parametrize(("text", "where"), [('["a",', "standard input"), ('"a"\n{oh\n', "line 2")])
def test_what_is_not_json_is_named_by_its_place(text: str, where: str) -> None:
    with pytest.raises(InvalidRequest, match=where):
        parse_json(text)
