"""Each kind of reranker gives, in any batch, what its reference gives for the query and one document alone."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from millstream.broker.config.spec import ModelSpec
from millstream.broker.contract.errors import InputTooLong, InvalidRequest, ModelUnavailable
from millstream.broker.contract.job import Json
from millstream.worker.models.base import Model, Prepared

CLOSE = 1e-5
QUERIES = ["which mill?", "the stream turns a mill", "水车"]
WORDS = ("mill", "stream", "turns", "corn", "miller", "grinds", "the", "a")
KINDS = ["cross-encoder", "classifier", "bi-encoder", "qwen3", "gpt2", "chat"]

Folders = Mapping[str, Path]
Load = Callable[..., Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Folders:
    # Torch takes seconds to import; most tests need none.
    import rerankers

    home = tmp_path_factory.mktemp("rerankers")
    made = {
        "cross-encoder": rerankers.save_cross_encoder(home / "cross"),
        "classifier": rerankers.save_chatting_classifier(home / "classifier"),
        "bi-encoder": rerankers.save_bi_encoder(home / "bi", tiny_model),
        "qwen3": rerankers.save_judge(home / "qwen3", "qwen3"),
        "gpt2": rerankers.save_judge(home / "gpt2", "gpt2"),
    }
    return {**made, "chat": rerankers.save_chatting_judge(home / "chat", made["qwen3"])}


@pytest.fixture(scope="module")
def loaded(folders: Folders) -> Mapping[str, Model]:
    return {kind: load(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def alone(folders: Folders) -> Callable[[str, str, str], float]:
    """What the reference makes of one query and one document, as the model scores by itself."""
    from sentence_transformers import CrossEncoder, SentenceTransformer

    pairs = {kind: CrossEncoder(str(folders[kind]), device="cpu") for kind in ("cross-encoder", "classifier", "chat")}
    vectors = SentenceTransformer(str(folders["bi-encoder"]), device="cpu")

    def score(kind: str, query: str, document: str) -> float:
        if kind in pairs:
            return float(pairs[kind].predict([(query, document)], show_progress_bar=False)[0])
        if kind == "bi-encoder":
            asked, given = vectors.encode_query([query]), vectors.encode_document([document])
            return float(vectors.similarity(asked, given)[0, 0])
        return judged(folders[kind], query, document)

    return score


def load(folder: Path, **settings: object) -> Any:
    from millstream.worker.models.reranking.reranker import load_reranker

    spec = ModelSpec.model_validate({"type": "reranker", "model_name": str(folder), **settings})
    return load_reranker(spec, device="cpu", threads=1)


def judged(folder: Path, query: str, document: str, instruction: str = "") -> float:
    """As the card of Qwen3-Reranker does it: the prompt's three pieces one by one, the last position's logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    task = instruction or "Given a web search query, retrieve relevant passages that answer the query"
    pieces = [
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
        f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ]
    ids = [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1]
    yes, no = (logits[tokenizer.convert_tokens_to_ids(word)] for word in ("yes", "no"))
    return float(torch.stack([no, yes]).softmax(0)[1])


def texts(count: int, longest: int = 12) -> list[str]:
    chance = random.Random(5)
    return ["", *(" ".join(chance.choices(WORDS, k=chance.randint(1, longest))) for _ in range(count - 1))]


def scores(model: Model, query: str, documents: Sequence[str], **options: Json) -> list[float]:
    rows = model.prepare(list(documents), {"query": query, **options})
    assert all(isinstance(row, Prepared) for row in rows), rows
    return cast(list[float], model.forward(cast(list[Prepared], rows)))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_any_length_and_query_score_in_one_batch_as_each_does_alone(
    kind: str, loaded: Mapping[str, Model], alone: Callable[[str, str, str], float]
) -> None:
    model = loaded[kind]
    pairs = [(query, document) for query in QUERIES for document in texts(8)]
    random.Random(3).shuffle(pairs)
    rows = [row for query, document in pairs for row in model.prepare([document], {"query": query})]

    together = cast(list[float], model.forward(cast(list[Prepared], rows)))

    expected = [alone(kind, *pair) for pair in pairs]
    assert np.std(expected) > 100 * CLOSE
    assert np.abs(np.array(together) - expected).max() < CLOSE
    assert all(type(score) is float for score in together)


@pytest.mark.parametrize("kind", ["cross-encoder", "classifier", "bi-encoder", "qwen3", "chat"])
def test_linear_layers_are_those_of_onednn(kind: str, loaded: Mapping[str, Any]) -> None:
    from millstream.worker.models.kernels.linear import Prepacked

    assert any(isinstance(module, Prepacked) for module in loaded[kind]._model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_with_kernels_off_the_librarys_own_layers_give_the_same_scores(
    kind: str, folders: Folders, loaded: Mapping[str, Any]
) -> None:
    from millstream.worker.models.base import packs
    from millstream.worker.models.kernels.linear import Prepacked

    own = load(folders[kind], kernels="off")

    expected, found = (scores(model, QUERIES[1], texts(8)) for model in (loaded[kind], own))

    assert not packs(own)
    assert not any(isinstance(module, Prepacked) for module in own._model.modules())
    assert own.fingerprint == loaded[kind].fingerprint
    assert np.abs(np.array(found) - expected).max() < CLOSE


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cross-encoder", "float32 cross-encoder Sigmoid"),
        ("classifier", "float32 cross-encoder Sigmoid"),
        ("bi-encoder", "float32 bi-encoder cosine"),
        ("qwen3", "float32 generative Sigmoid"),
        ("chat", "float32 generative Sigmoid"),
    ],
)
def test_a_fingerprint_tells_weights_type_and_kind(kind: str, words: str, loaded: Mapping[str, Model]) -> None:
    digest, _, rest = loaded[kind].fingerprint.partition(" ")

    assert rest == words
    assert len(digest) == len("0123456789abcdef+01234567")


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_counts_its_own_tokens_and_a_sample_has_about_as_many_as_asked(
    kind: str, loaded: Mapping[str, Model]
) -> None:
    model = loaded[kind]

    short, long = model.prepare(["mill", "mill mill mill"], {"query": "the mill"})
    (sample,) = model.prepare(model.samples(16), model.sample_options)

    assert isinstance(short, Prepared)
    assert isinstance(long, Prepared)
    assert isinstance(sample, Prepared)
    assert short.tokens < long.tokens
    if kind == "cross-encoder":
        # [CLS] the mill [SEP] mill [SEP]
        assert (short.tokens, sample.tokens) == (6, 16)


def test_a_score_is_given_raw_or_through_a_sigmoid_and_by_itself_as_the_model_says(
    folders: Folders, tmp_path: Path
) -> None:
    own = {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5.0.0"}
    model = load(edited(folders["cross-encoder"], tmp_path, "config.json", sentence_transformers=own))
    documents = texts(5)

    raw = scores(model, "mill", documents, scores="raw")
    sigmoid = scores(model, "mill", documents, scores="sigmoid")

    assert scores(model, "mill", documents) == raw
    assert np.allclose(sigmoid, 1 / (1 + np.exp(-np.array(raw))), atol=1e-6)
    assert max(sigmoid) - min(sigmoid) > 0.02


def test_a_judge_whose_yes_alone_counts_scores_as_its_settings_say(folders: Folders, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    folder = edited(folders["chat"], tmp_path, "1_LogitScore/config.json", false_token_id=None)
    edited(folder, tmp_path, "config_sentence_transformers.json", activation_fn="torch.nn.modules.linear.Identity")
    reference, documents = CrossEncoder(str(folder), device="cpu"), texts(4)
    expected = [float(reference.predict([("mill", each)], show_progress_bar=False)[0]) for each in documents]

    assert scores(load(folder), "mill", documents) == pytest.approx(expected, abs=CLOSE)
    assert max(map(abs, expected)) > 0.1
    edited(folder, tmp_path, "config_sentence_transformers.json", activation_fn="torch.nn.modules.activation.Softplus")
    with pytest.raises(ModelUnavailable, match="Softplus"):
        load(folder)


def test_a_bi_encoder_compares_vectors_as_the_model_says(folders: Folders, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    folder = edited(folders["bi-encoder"], tmp_path, "config_sentence_transformers.json", similarity_fn_name="dot")
    reference, documents = SentenceTransformer(str(folder), device="cpu"), texts(4)
    asked, given = reference.encode_query(["mill"]), [reference.encode_document([each])[0] for each in documents]

    assert scores(load(folder), "mill", documents) == pytest.approx((np.array(given) @ asked[0]).tolist(), abs=1e-4)


def test_calls_that_want_their_scores_in_different_ways_share_a_batch(loaded: Mapping[str, Model]) -> None:
    model = loaded["cross-encoder"]
    ways: list[Mapping[str, Json]] = [{"scores": "raw"}, {}, {"scores": "sigmoid"}]
    rows = [row for way in ways for row in model.prepare(["corn"], {"query": "mill", **way})]

    raw, own, sigmoid = cast(list[float], model.forward(cast(list[Prepared], rows)))

    assert own == sigmoid == pytest.approx(1 / (1 + np.exp(-raw)), abs=1e-6)


@pytest.mark.parametrize("kind", ["qwen3", "chat", "classifier"])
def test_an_instruction_changes_what_a_generative_reranker_is_asked(
    kind: str, loaded: Mapping[str, Model], folders: Folders
) -> None:
    (usual,) = scores(loaded[kind], "mill", ["corn"])
    (other,) = scores(loaded[kind], "mill", ["corn"], instruction="find the stream")

    if kind == "qwen3":
        assert other == pytest.approx(judged(folders[kind], "mill", "corn", "find the stream"), abs=CLOSE)
    assert abs(usual - other) > CLOSE


def test_the_guide_says_what_a_generative_reranker_is_asked() -> None:
    from millstream.broker.contract.rerank import RerankOptions
    from millstream.worker.models.reranking.prompts import qwen3_frame

    guide = (Path(__file__).parents[2] / "docs" / "rerank.md").read_text(encoding="utf-8")

    assert "...".join(qwen3_frame(RerankOptions("which river?"))) in guide


@pytest.mark.parametrize("kind", ["cross-encoder", "qwen3"])
@pytest.mark.parametrize("side", ["end", "start"])
def test_of_a_row_that_is_too_long_only_the_document_is_cut(
    kind: str, side: str, loaded: Mapping[str, Model], folders: Folders
) -> None:
    words = ["grinds", *["mill", "stream", "corn"] * 200, "turns"]
    # Of the cross-encoder's room more than half: cutting the longer of two texts would cut this one, too.
    query, document = "the mill " * 10, " ".join(words)

    (row,) = loaded[kind].prepare([document], {"query": query, "truncate": side})

    assert isinstance(row, Prepared)
    assert row.truncated
    got, all_of_it = ids(row), uncut(kind, folders[kind], query, document)
    head = next(at for at, (a, b) in enumerate(zip(got, all_of_it, strict=False)) if a != b)
    tail = next(at for at, (a, b) in enumerate(zip(got[::-1], all_of_it[::-1], strict=False)) if a != b)
    # What is left is the whole but for one piece, at the document's start or at its end.
    assert len(got) == row.tokens == head + tail == {"cross-encoder": 32, "qwen3": 512}[kind]
    assert (tail < 100 and head > tail) if side == "end" else head < len(all_of_it) - tail


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_too_long_is_an_error_alone(kind: str, loaded: Mapping[str, Model]) -> None:
    rows = loaded[kind].prepare(["corn", "corn " * 600, "a", 5], {"query": "mill"})

    assert [type(row) for row in rows] == [Prepared, InputTooLong, Prepared, InvalidRequest]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("truncate", ["none", "end"])
def test_a_query_that_is_too_long_by_itself_is_never_cut(kind: str, truncate: str, loaded: Mapping[str, Model]) -> None:
    rows = loaded[kind].prepare(["corn", ""], {"query": "mill " * 600, "truncate": truncate})

    assert [type(row) for row in rows] == [InputTooLong, InputTooLong]
    assert "query" in str(rows[0])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cross-encoder", {}),
        ("cross-encoder", {"query": 5}),
        ("cross-encoder", {"query": "mill", "scores": "softmax"}),
        ("cross-encoder", {"query": "mill", "scores": ["raw"]}),
        ("cross-encoder", {"query": "mill", "instruction": "find"}),
        ("bi-encoder", {"query": "mill", "instruction": "find"}),
        ("bi-encoder", {"query": "mill", "scores": "sigmoid"}),
        ("qwen3", {"query": "mill", "instruction": 5}),
    ],
)
def test_a_question_that_cannot_be_is_an_error_for_each_row(
    kind: str, options: Mapping[str, Json], loaded: Mapping[str, Model]
) -> None:
    rows = loaded[kind].prepare(["corn", "a"], options)

    assert [type(row) for row in rows] == [InvalidRequest, InvalidRequest]


def test_a_bi_encoder_encodes_a_query_once_for_all_rows_of_a_batch(
    loaded: Mapping[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    from millstream.worker.models.embedding.encoder import Encoder

    model, run = loaded["bi-encoder"], Encoder.run
    rows = [row for query in ("mill", "corn", "mill") for row in model.prepare(texts(6), {"query": query})]
    sizes: list[int] = []

    def counted(self: Encoder, given: Sequence[Prepared]) -> object:
        sizes.append(len(given))
        return run(self, given)

    monkeypatch.setattr(Encoder, "run", counted)
    model.forward(cast(list[Prepared], rows))

    assert sizes == [2, 18]


def test_a_classifier_of_several_labels_is_no_reranker(tmp_path: Path, folders: Folders) -> None:
    import rerankers

    with pytest.raises(ModelUnavailable, match="has 3 labels") as failure:
        load(rerankers.save_cross_encoder(tmp_path / "three", labels=3))
    assert "one label" in failure.value.hint


@pytest.mark.parametrize("architectures", [["BertModel"], [], None])
def test_what_scores_nothing_is_refused(architectures: list[str] | None, folders: Folders, tmp_path: Path) -> None:
    folder = edited(folders["cross-encoder"], tmp_path, "config.json", architectures=architectures)

    with pytest.raises(ModelUnavailable, match="no reranker that can be run here"):
        load(folder)


@pytest.mark.parametrize("model_type", ["SparseEncoder", "CrossEncoder"])
def test_modules_that_make_no_score_are_refused(model_type: str, folders: Folders, tmp_path: Path) -> None:
    folder = edited(folders["bi-encoder"], tmp_path, "config_sentence_transformers.json", model_type=model_type)

    with pytest.raises(ModelUnavailable, match="no reranker that can be run here"):
        load(folder)


def test_a_language_model_without_yes_and_no_is_refused(tmp_path: Path) -> None:
    import rerankers

    with pytest.raises(ModelUnavailable, match='no "yes" and "no"'):
        load(rerankers.save_judge(tmp_path / "german", "qwen3", "ja nein"))


def test_a_chat_template_that_drops_the_document_is_refused(folders: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["chat"], tmp_path / "deaf"))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")

    with pytest.raises(ModelUnavailable, match="does not carry a query and a document"):
        load(folder)


def test_broken_weights_are_told_with_their_reason(folders: Folders, tmp_path: Path) -> None:
    for kind in ("cross-encoder", "bi-encoder", "qwen3"):
        folder = Path(shutil.copytree(folders[kind], tmp_path / kind))
        next(folder.glob("*.safetensors")).write_bytes(b"no weights")

        with pytest.raises(ModelUnavailable, match=r"model\.safetensors: it is no whole safetensors file"):
            load(folder)


@pytest.mark.parametrize("kind", ["cross-encoder", "bi-encoder", "qwen3"])
def test_nobodys_code_runs_because_a_reranker_brought_it(kind: str, folders: Folders, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder, ran = Path(shutil.copytree(folders[kind], tmp_path / "model")), tmp_path / "ran"
    (folder / "foreign.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    config = (folder / "config.json").read_text()
    names = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    own = {"AutoConfig": "foreign.Config", **dict.fromkeys(names, "foreign.Model")}
    (folder / "config.json").write_text(json.dumps({**json.loads(config), "model_type": "foreign", "auto_map": own}))
    with pytest.raises(ModelUnavailable):
        load(folder)
    (folder / "config.json").write_text(config)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailable):
        load(folder)

    assert not ran.exists()


def edited(folder: Path, home: Path, file: str, **changes: object) -> Path:
    """A copy of the model in `home`, or the one that is there, with the settings in `file` changed."""
    copy = home / "edited"
    if folder != copy:
        shutil.copytree(folder, copy)
    kept = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**kept, **changes}))
    return copy


def uncut(kind: str, folder: Path, query: str, document: str) -> list[int]:
    """The ids of a row, however long."""
    if kind == "cross-encoder":
        from transformers import AutoTokenizer

        made: list[int] = AutoTokenizer.from_pretrained(folder)(query, document, verbose=False)["input_ids"]
        return made
    return ids(load(folder, max_length=10_000).prepare([document], {"query": query})[0])


def ids(row: object) -> list[int]:
    from millstream.worker.models.reranking.pairs import Pair

    assert isinstance(row, Prepared)
    assert isinstance(row.features, Pair)
    return list(row.features.ids["input_ids"])
