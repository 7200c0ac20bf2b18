"""What may be asked of an embedding service, and what vectors then look like."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.embedding import MAX_PROMPT, EmbedOptions
from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.job import Json
from millstream.broker.contract.vectors import shaped

FLOATS = arrays.arrays(
    np.float32, st.tuples(st.integers(0, 4), st.integers(1, 20)), elements=st.floats(-1e3, 1e3, width=32)
)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"truncate": "middle"}, "none, start, end"),
        ({"input_type": "passage"}, "query, document, none"),
        ({"input_type": ["query"]}, "query, document, none"),
        ({"prompt": 5}, "a string"),
        ({"prompt": "x" * (MAX_PROMPT + 1)}, "a string"),
        ({"dimensions": 0}, "above 0"),
        ({"dimensions": True}, "above 0"),
        ({"dimensions": 2.0}, "above 0"),
        ({"normalize": 1}, "True or False"),
        ({"encoding": "int8"}, "float32, float16, binary"),
        ({"input_typ": "query"}, "input_type"),
        ({"prompt": "", "input_type": "none"}, "leave one of them out"),
    ],
)
def test_what_no_model_could_do_is_refused_with_what_it_could(options: dict[str, Json], said: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        EmbedOptions.read(options)

    assert said in refused.value.hint


@given(
    st.builds(
        EmbedOptions,
        truncate=st.sampled_from([None, "none", "end"]),
        input_type=st.none(),
        prompt=st.none() | st.sampled_from(["", "float32", "q: "]),
        dimensions=st.none() | st.integers(1, 9),
        normalize=st.sampled_from([None, True, False]),
        encoding=st.sampled_from(["float32", "float16", "binary"]),
    )
)
def test_options_are_read_as_they_were_written(options: EmbedOptions) -> None:
    assert EmbedOptions.read(options.json()) == options
    typed = options._replace(prompt=None, input_type="document")
    assert EmbedOptions.read(typed.json()) == typed


def test_who_asks_for_nothing_sends_nothing() -> None:
    assert EmbedOptions().json() == {}
    assert EmbedOptions.read({"normalize": None, "encoding": None, "dimensions": None}) == EmbedOptions()


@pytest.mark.parametrize(
    ("options", "of_units", "of_others"),
    [
        (EmbedOptions(), False, False),
        (EmbedOptions(normalize=True), True, True),
        (EmbedOptions(dimensions=3), True, False),
        (EmbedOptions(dimensions=3, normalize=False), False, False),
        (EmbedOptions(dimensions=3, normalize=True), True, True),
    ],
)
def test_a_cut_vector_is_a_unit_vector_again_where_the_whole_one_was(
    options: EmbedOptions, of_units: bool, of_others: bool
) -> None:
    assert (options.unit(True), options.unit(False)) == (of_units, of_others)


@given(FLOATS, st.none() | st.integers(1, 20), st.booleans())
def test_bits_are_those_of_sentence_transformers(
    vectors: np.ndarray[tuple[int, int], np.dtype[np.float32]], dimensions: int | None, normalize: bool
) -> None:
    cut = vectors[:, :dimensions]

    packed = shaped(vectors, dimensions, normalize, "binary")

    assert packed.dtype == np.uint8
    assert packed.shape == (len(cut), -(-cut.shape[1] // 8))
    assert np.array_equal(np.unpackbits(np.asarray(packed, np.uint8), axis=1)[:, : cut.shape[1]], cut > 0)


@given(FLOATS, st.none() | st.integers(1, 20))
def test_a_unit_vector_has_length_one_and_the_same_direction(
    vectors: np.ndarray[tuple[int, int], np.dtype[np.float32]], dimensions: int | None
) -> None:
    cut = vectors[:, :dimensions].astype(np.float64)
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)

    units = shaped(vectors, dimensions, True, "float32")

    assert units.dtype == np.float32
    assert np.allclose(units * np.maximum(lengths, 1e-12), cut, rtol=1e-4, atol=1e-30)


def test_a_number_that_float16_cannot_hold_is_infinite_and_no_warning() -> None:
    assert shaped(np.array([[1e9, 1.0]], np.float32), None, False, "float16").tolist() == [[float("inf"), 1.0]]


@pytest.mark.parametrize(
    ("said", "published"),
    [
        ({}, set()),
        ({"attention": "auto", "backend": "torch", "kernels": "auto"}, set()),
        ({"attention": "eager"}, {"attention"}),
        ({"kernels": "off"}, {"kernels"}),
        ({"kind": "query_likelihood"}, {"kind"}),
        ({"backend": "onnx"}, {"backend"}),
        ({"backend": "onnx", "model_file": "onnx/model_O3.onnx"}, {"backend", "model_file"}),
    ],
)
def test_how_a_model_runs_is_published_where_somebody_said_it(said: dict[str, str], published: set[str]) -> None:
    model = ModelSpec.model_validate({"type": "embedding", "model_name": "m", **said})
    spec = ServiceSpec(name="embed", model=model, model_ref="m", runtime=Runtime())

    # Records of versions that do not know it stay equal: nobody needs --replace for what did not change.
    assert {"attention", "backend", "kernels", "kind", "model_file"} & set(
        json.loads(spec.to_json())["model"]
    ) == published
    assert ServiceSpec.from_json(spec.to_json()) == spec
