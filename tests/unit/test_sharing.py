"""No result depends on the rows that a forward was shared with: each row is what the library gives for it alone.

Here a few models of each kind. All architectures, poolings and padding sides take minutes:

    MILLSTREAM_LONG=1 .venv/bin/pytest tests/unit/test_sharing.py
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, cast

import architectures
import numpy as np
import pytest
import torch
from embedders import save_routed
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from millstream.broker.config.spec import ModelSpec
from millstream.broker.contract.rerank import RerankOptions
from millstream.worker.engines.one_shot import run_rows
from millstream.worker.models.base import Model, Prepared
from millstream.worker.models.embedding import encoder
from millstream.worker.models.embedding.embedding import EmbeddingModel
from millstream.worker.models.kernels.packing import Packing
from millstream.worker.models.loading.sharing import FLOAT32, HALF, REDUCED, Padding, Precision, Sharing, Side, measure
from millstream.worker.models.reranking.prompts import likelihood_frame, qwen3_frame
from millstream.worker.models.reranking.reranker import load_reranker

CLOSE = 1e-5
LONG = os.environ.get("MILLSTREAM_LONG") == "1"
POOLINGS = ("mean", "cls", "max", "lasttoken")
SIDES = ("left", "right")
PACKS = ("bert", "roberta", "xlm-roberta", "camembert")
QUERIES = ("who grinds", "the mill is in the stream and turns 12 stone")

Cell = tuple[str, str, str]
"""An architecture, a pooling and a padding side."""


def cells(names: Sequence[str], some: Sequence[Cell]) -> Sequence[Cell]:
    """All that there are, or `some` of them."""
    return list(product(names, POOLINGS, SIDES)) if LONG else some


def texts(count: int) -> list[str]:
    """Short and long ones, some of one length."""
    chance = random.Random(7)
    lengths = [1, 2, 2, 3, 3, 5, 9, 14, 20, 20, 45, *(chance.randint(1, 30) for _ in range(count))][:count]
    return [" ".join(chance.choices(architectures.WORDS, k=length)) for length in lengths]


def saved(folder: Path, cell: Cell) -> Path:
    """The model of a cell, as sentence-transformers saves it."""
    name, pooling, side = cell
    transformer = Transformer(str(architectures.save_net(folder / "net", name, "embed", side)))
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "model"))
    return folder / "model"


def spec_of(model_type: str, folder: Path, **settings: object) -> ModelSpec:
    return ModelSpec.model_validate({"type": model_type, "model_name": str(folder), **settings})


def results(model: Model, rows: Sequence[Prepared]) -> Any:
    """Float64 [rows, ...]; fails for a row that has an error."""
    return np.array([np.asarray(outcome, dtype=np.float64) for outcome in run_rows(model, rows)])


def prepared(model: Model, inputs: Sequence[str], query: str = "") -> list[Prepared]:
    rows = model.prepare(list(inputs), {"query": query} if query else {})
    assert all(isinstance(row, Prepared) for row in rows), rows
    return cast(list[Prepared], rows)


def difference(model: Model, rows: Sequence[Prepared], expected: Sequence[object], differ: bool = True) -> float:
    """The largest between rows alone, rows together and what is expected; that is to `differ` by row."""
    shuffled = random.Random(5).sample(range(len(rows)), len(rows))
    together = results(model, [rows[at] for at in shuffled])[np.argsort(shuffled)]
    alone = np.concatenate([results(model, [row]) for row in rows])
    library = np.asarray(expected, dtype=np.float64)
    assert together.shape == alone.shape == library.shape
    assert np.std(library) > 100 * CLOSE or not differ
    return float(max(np.abs(together - alone).max(), np.abs(together - library).max()))


@pytest.mark.parametrize(
    "cell",
    cells(
        list(architectures.ENCODERS),
        [
            ("distilbert", "cls", "left"),
            ("bert", "lasttoken", "left"),
            ("roberta", "mean", "left"),
            ("qwen3", "lasttoken", "right"),
            ("xlnet", "cls", "right"),
            ("fnet", "mean", "right"),
            ("nystromformer", "max", "left"),
            ("rope, dynamic", "lasttoken", "left"),
            ("rope, long", "mean", "right"),
            ("big_bird", "mean", "right"),
        ],
    ),
    ids="-".join,
)
def test_a_vector_is_what_the_library_gives_for_the_text_alone(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    folder = saved(tmp_path, cell)
    given = texts(24)
    expected = alone_by_the_library(folder, given)

    packed = EmbeddingModel(spec_of("embedding", folder), "cpu", threads=1)
    assert packed.packs == (cell[0] in PACKS)
    monkeypatch.setattr(Packing, "of", lambda model: None)
    padded = EmbeddingModel(spec_of("embedding", folder), "cpu", threads=1)

    for model in (packed, padded) if packed.packs else (padded,):
        largest = difference(model, prepared(model, given), expected)
        record_property("difference", largest)
        assert largest < CLOSE


def alone_by_the_library(folder: Path, given: Sequence[str]) -> list[object]:
    """Each text by a model that was just loaded: some models keep something of what they ran."""
    reference = SentenceTransformer(str(folder), device="cpu")
    keeps = any(getattr(module, "attention_type", "") == "block_sparse" for module in reference.modules())
    found = []
    for text in given:
        reference = SentenceTransformer(str(folder), device="cpu") if keeps else reference
        found.append(reference.encode([text], show_progress_bar=False)[0])
    return found


@pytest.mark.parametrize(
    "cell",
    cells(
        list(architectures.ENCODERS),
        [("distilbert", "mean", "left"), ("roberta", "cls", "left"), ("fnet", "mean", "left")],
    ),
    ids="-".join,
)
def test_a_bi_encoder_scores_as_the_library_does_for_each_document_alone(
    cell: Cell, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = saved(tmp_path, cell)
    given = texts(12)
    asked = alone_by_the_library(folder, QUERIES)
    documents = alone_by_the_library(folder, given)
    reference = SentenceTransformer(str(folder), device="cpu")
    expected = reference.similarity(np.array(asked), np.array(documents)).flatten().tolist()

    model = load_reranker(spec_of("reranker", folder), "cpu", threads=1)
    rows = [row for query in QUERIES for row in prepared(model, given, query)]

    # A causal model's first token sees itself alone, and is the same in all texts.
    largest = difference(model, rows, expected, differ=cell[1] != "cls" or cell[0] not in architectures.CAUSAL)
    record_property("difference", largest)
    assert largest < CLOSE


@pytest.mark.parametrize(
    ("name", "side"),
    list(product(architectures.CLASSIFIERS, SIDES))
    if LONG
    else [("bert", "left"), ("distilbert", "left"), ("xlnet", "left"), ("llama", "left"), ("fnet", "right")],
)
def test_a_cross_encoder_scores_as_the_library_does_for_each_pair_alone(
    name: str, side: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = architectures.save_net(tmp_path / "net", name, "classify", side)
    given = texts(12)
    reference = CrossEncoder(str(folder), device="cpu")
    pairs = [(query, document) for query in QUERIES for document in given]
    expected = [float(reference.predict([pair], show_progress_bar=False)[0]) for pair in pairs]

    model = load_reranker(spec_of("reranker", folder), "cpu", threads=1)
    rows = [row for query in QUERIES for row in prepared(model, given, query)]

    largest = difference(model, rows, expected)
    record_property("difference", largest)
    assert largest < CLOSE


@pytest.mark.parametrize(
    ("name", "side"),
    list(product(architectures.CAUSAL, SIDES))
    if LONG
    else [("gpt2", "right"), ("bart", "left"), ("rwkv", "right"), ("rope, dynamic", "left")],
)
def test_a_language_model_judges_each_pair_as_it_does_alone(
    name: str, side: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    # A prompt's end, which is the same in all of them, has more tokens than a small window.
    settings = {"sliding_window": 200} if name == "mistral" else {}
    folder = architectures.save_net(tmp_path / "net", name, "predict", side, **settings)
    given = texts(8)
    expected = [judged(folder, query, document) for query in QUERIES for document in given]

    model = load_reranker(spec_of("reranker", folder), "cpu", threads=1)
    rows = [row for query in QUERIES for row in prepared(model, given, query)]

    largest = difference(model, rows, expected)
    record_property("difference", largest)
    assert largest < CLOSE


def judged(folder: Path, query: str, document: str) -> float:
    """By a model that was just loaded, of the prompt alone."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    head, tail = qwen3_frame(RerankOptions(query))
    ids = tokenizer(head + document + tail, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    yes, no = (logits[tokenizer.convert_tokens_to_ids(word)] for word in ("yes", "no"))
    return float(torch.sigmoid(yes - no))


@pytest.mark.parametrize(
    ("name", "side"),
    list(product(architectures.CAUSAL, SIDES))
    if LONG
    else [("gpt2", "right"), ("bart", "left"), ("rwkv", "right"), ("rope, dynamic", "left"), ("gemma2", "left")],
)
def test_a_query_is_as_likely_in_any_batch_as_alone(
    name: str, side: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = architectures.save_net(tmp_path / "net", name, "predict", side)
    given = texts(8)
    expected = [likelihood(folder, query, document) for query in QUERIES for document in given]

    model = load_reranker(spec_of("reranker", folder, kind="query_likelihood"), "cpu", threads=1)
    rows = [row for query in QUERIES for row in prepared(model, given, query)]

    largest = difference(model, rows, expected)
    record_property("difference", largest)
    assert largest < CLOSE


def likelihood(folder: Path, query: str, document: str) -> float:
    """The mean over the query's tokens, by a model that was just loaded, of all logits of the prompt alone."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    head, tail = likelihood_frame(RerankOptions(query))
    ids = tokenizer(head + document + tail, add_special_tokens=False)["input_ids"]
    count = len(tokenizer(query, add_special_tokens=False)["input_ids"])
    with torch.inference_mode():
        found = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return float(np.mean([float(found[at - 1, ids[at]]) for at in range(len(ids) - count, len(ids))]))


Net = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""What a model makes of numbers [rows, longest] and their mask."""

NETS: dict[str, tuple[Net, Sharing]] = {
    "padding is masked": (lambda numbers, mask: (numbers * mask).sum(1, keepdim=True), Sharing()),
    "the first number counts": (lambda numbers, mask: numbers[:, :1], Sharing()),
    "the last number counts": (lambda numbers, mask: numbers[:, -1:], Sharing("padded", "left")),
    "padding counts": (lambda numbers, mask: torch.full((len(numbers), 1), float(mask.shape[1])), Sharing("length")),
    "rows are of one scale": (
        lambda numbers, mask: (numbers / numbers.abs().max() * 127).round().sum(1, keepdim=True),
        Sharing("single"),
    ),
    "one row at a time": (lambda numbers, mask: numbers.sum(1).reshape(1, 1), Sharing("single")),
    "another kernel's digits": (
        lambda numbers, mask: (numbers * mask).sum(1, keepdim=True) * (1 + 2e-5 * (len(numbers) > 1)),
        Sharing(),
    ),
    "half the digits": (
        lambda numbers, mask: ((numbers * mask).sum(1, keepdim=True) * (1 + 5e-3 * (len(numbers) > 1))).bfloat16(),
        Sharing(),
    ),
}


@pytest.mark.parametrize("name", list(NETS))
def test_rows_share_forwards_as_far_as_that_changes_no_result(name: str) -> None:
    net, expected = NETS[name]
    chance = random.Random(2)
    rows = [
        Prepared(length, {"input_ids": [chance.randint(3, 999) for _ in range(length)]})
        for length in (1, 2, 5, 5, 5, 9, 30)
    ]

    def forward(some: Sequence[Prepared], side: Side) -> torch.Tensor:
        made = Padding({"input_ids": 1}).pad([cast(Any, row.features) for row in some], side)
        return net(made["input_ids"].float(), made["attention_mask"])

    found = measure(forward, rows, ("right", "left"))

    assert found == expected
    shared = found.run_in_groups(rows, lambda some: forward(some, found.side)).float()
    alone = torch.cat([forward([row], found.side) for row in rows]).float()
    assert torch.allclose(shared, alone, rtol=1e-2 if name == "half the digits" else 1e-4)


def off_by(padding: float, noise: float, dtype: torch.dtype = torch.float32) -> Callable[[Any, Side], torch.Tensor]:
    """A forward whose results are off by `noise` beside other rows, and by `padding` beside ones of other lengths."""

    def forward(rows: Sequence[Prepared], side: Side) -> torch.Tensor:
        shares, pads = len(rows) > 1, len({row.tokens for row in rows}) > 1
        return torch.full((len(rows), 1), 1 + (padding if pads else noise * shares), dtype=dtype)

    return forward


@pytest.mark.parametrize(
    ("forward", "precision", "kind"),
    [
        pytest.param(off_by(0.0234, 0.0, torch.bfloat16), FLOAT32, "padded", id="28 layers in bfloat16"),
        pytest.param(off_by(0.08, 0.03, torch.float16), FLOAT32, "padded", id="half, both"),
        pytest.param(off_by(0.15, 0.01, torch.bfloat16), FLOAT32, "length", id="half, padding counts"),
        pytest.param(off_by(0.9, 0.2, torch.bfloat16), FLOAT32, "length", id="half, noisy, padding counts"),
        pytest.param(off_by(0.5, 0.5, torch.bfloat16), FLOAT32, "single", id="half, rows change each other"),
        pytest.param(off_by(0.0234, 0.01), HALF, "padded", id="float32 of half weights"),
        pytest.param(off_by(2e-3, 1e-3), REDUCED, "padded", id="TF32"),
        pytest.param(off_by(8e-4, 0.0), REDUCED, "padded", id="TF32, same kernels"),
        pytest.param(off_by(0.01, 0.01), REDUCED, "single", id="dynamic int8"),
        pytest.param(off_by(2e-3, 1e-3), FLOAT32, "single", id="float32"),
    ],
)
def test_how_far_results_may_differ_follows_the_least_precise_arithmetic(
    forward: Any, precision: Precision, kind: str
) -> None:
    rows = [Prepared(length, None) for length in (1, 2, 5, 5, 9)]

    assert measure(forward, rows, ("right", "left"), precision=precision).kind == kind


def test_a_models_precision_is_that_of_its_least_precise_part() -> None:
    plain, mixed = torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2).bfloat16(), torch.nn.Linear(2, 1))

    assert Precision.of(plain, "cpu", "torch") == FLOAT32
    assert Precision.of(plain, "cuda", "torch") == Precision.of(torch.nn.Identity(), "cpu", "onnx") == REDUCED
    assert Precision.of(mixed, "cpu", "torch") == Precision.of(mixed, "cuda", "torch") == HALF


def test_each_route_is_measured_once(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []

    def counted(forward: object, rows: Sequence[Any], *args: object) -> Sharing:
        tried.append(rows[0].plan.group.route)
        return Sharing()

    monkeypatch.setattr(encoder, "measure", counted)
    EmbeddingModel(spec_of("embedding", save_routed(tiny_model, tiny_model, tmp_path / "routed")), "cpu", threads=1)

    assert sorted(map(str, tried)) == ["document", "query"]


def test_rows_beyond_a_length_share_forwards_by_length_alone() -> None:
    rows = [Prepared(length, None) for length in (3, 20, 5, 16, 20, 17)]
    sizes: list[list[int]] = []

    def run(some: Sequence[Prepared]) -> torch.Tensor:
        sizes.append([row.tokens for row in some])
        return torch.tensor([row.tokens for row in some])

    found = Sharing(max_tokens=16).run_in_groups(rows, run)

    assert sizes == [[3, 5, 16], [20, 20], [17]]
    assert found.tolist() == [row.tokens for row in rows]
    assert Sharing(max_tokens=16).of_one_forward(rows) == ()
    assert Sharing().of_one_forward(rows) == rows
