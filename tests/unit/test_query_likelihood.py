"""A language model ranks by the likelihood of the query: each score is that of a plain loop over all logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import architectures
import numpy as np
import pytest
import rerankers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from millstream.broker.config.spec import ModelSpec
from millstream.broker.contract.answer import allowed_distance, distance
from millstream.broker.contract.errors import InputTooLong, InvalidRequest, ModelUnavailable
from millstream.broker.contract.job import Json
from millstream.broker.contract.operations import RERANK
from millstream.broker.contract.rerank import RerankOptions
from millstream.worker.measuring.agreement import answer_of
from millstream.worker.models.base import Prepared
from millstream.worker.models.loading.sharing import Sharing
from millstream.worker.models.reranking import likelihoods
from millstream.worker.models.reranking.pairs import Pair
from millstream.worker.models.reranking.prompts import likelihood_frame
from millstream.worker.models.reranking.query_likelihood import QueryLikelihood
from millstream.worker.models.reranking.reranker import load_reranker

SMOLLM2 = Path.home() / ".cache" / "millstream" / "models" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"

CLOSE = 1e-5
QUESTIONS = {
    "What is the capital of France?": "Paris is the capital and largest city of France, on the river Seine.",
    "How do bees make honey?": (
        "Worker bees collect nectar from flowers and store it in the comb, where it thickens into honey."
    ),
    "Who wrote Hamlet?": "Hamlet is a tragedy by William Shakespeare, written around 1600.",
    "Why is the sky blue?": (
        "Air molecules scatter short wavelengths of sunlight more strongly than long ones, "
        "so the daytime sky looks blue."
    ),
    "How far away is the moon?": (
        "The average distance between the Earth and its natural satellite, the Moon, is about 384,000 kilometres."
    ),
    "What does a mill grind?": ("A watermill uses the power of a stream to turn stones that grind corn into flour."),
    "How is steel made?": (
        "Iron ore is smelted with coke in a blast furnace, and carbon is removed from the pig iron to make steel."
    ),
    "When did the Second World War end?": (
        "Germany surrendered in May 1945 and Japan in September 1945, which ended the war."
    ),
}
QUERIES = ("which mill?", "the stream turns a mill", "水车", "mill")
DOCUMENTS = ("", "corn", "the miller grinds", "a stream " * 20, "stream mill corn a the", "turns a wheel", "the mill")


@pytest.fixture(scope="module", params=["qwen3", "gpt2", "gemma2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 2 caps its logits, so its own forward makes them; the output layer of the others does."""
    home, name = tmp_path_factory.mktemp("likelihood"), str(request.param)
    if name == "gemma2":
        return architectures.save_net(home, name, "predict", "right", final_logit_softcapping=3.0)
    return rerankers.save_judge(home, name)


@pytest.fixture(scope="module")
def model(folder: Path) -> QueryLikelihood:
    return load(folder)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rerankers.save_judge(tmp_path_factory.mktemp("qwen3"), "qwen3")


def load(folder: Path, **settings: object) -> QueryLikelihood:
    given = {"type": "reranker", "model_name": str(folder), "kind": "query_likelihood", **settings}
    return cast(QueryLikelihood, load_reranker(ModelSpec.model_validate(given), device="cpu", threads=1))


def plain(folder: Path, query: str, document: str, instruction: str | None = None) -> float:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    net: Any = AutoModelForCausalLM.from_pretrained(folder)
    head, tail = likelihood_frame(RerankOptions(query, instruction=instruction))
    ids = tokenizer(head + document + tail, add_special_tokens=False)["input_ids"]
    before = len(tokenizer((head + document + tail).removesuffix(f" {query}"), add_special_tokens=False)["input_ids"])
    with torch.inference_mode():
        found = net(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(np.mean([float(found[at - 1, ids[at]]) for at in range(before, len(ids))]))


def scores(model: QueryLikelihood, query: str, documents: Sequence[str], **options: Json) -> list[float]:
    rows = model.prepare(list(documents), {"query": query, **options})
    assert all(isinstance(row, Prepared) for row in rows), rows
    return cast(list[float], model.forward(cast(list[Prepared], rows)))


@pytest.mark.parametrize("most_logits", [likelihoods.MOST_LOGITS, 1_000])
def test_rows_of_any_length_and_query_score_in_one_batch_as_a_plain_loop_scores_each(
    most_logits: int, folder: Path, model: QueryLikelihood, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihoods, "MOST_LOGITS", most_logits)
    pairs = [(query, document) for document in DOCUMENTS for query in QUERIES]
    rows = [row for query, document in pairs for row in model.prepare([document], {"query": query})]

    together = cast(list[float], model.forward(cast(list[Prepared], rows)))

    expected = [plain(folder, *pair) for pair in pairs]
    assert np.std(expected) > 100 * CLOSE
    assert np.abs(np.array(together) - expected).max() < CLOSE
    assert all(type(score) is float and score < 0 for score in together)


def test_the_output_layer_runs_alone_if_the_models_own_forward_does_nothing_more(
    folder: Path, model: QueryLikelihood
) -> None:
    caps = '"gemma2"' in (folder / "config.json").read_text(encoding="utf-8")

    assert model._likelihoods.sides == (("left",) if caps else ("right", "left"))
    # Rows of all lengths share a forward: padding is not what a score is read from.
    assert model._sharing == Sharing("padded", "left" if caps else "right")


def test_a_raw_score_is_the_usual_one_and_a_sigmoid_is_refused(model: QueryLikelihood) -> None:
    assert scores(model, "mill", DOCUMENTS, scores="raw") == scores(model, "mill", DOCUMENTS)
    (refused,) = model.prepare(["corn"], {"query": "mill", "scores": "sigmoid"})
    assert isinstance(refused, InvalidRequest)


def test_an_instruction_precedes_the_passage(folder: Path, model: QueryLikelihood) -> None:
    (found,) = scores(model, "mill", ["corn"], instruction="find the stream")

    assert found == pytest.approx(plain(folder, "mill", "corn", "find the stream"), abs=CLOSE)
    assert abs(found - scores(model, "mill", ["corn"])[0]) > CLOSE


def test_spaces_around_a_query_count_for_nothing(model: QueryLikelihood) -> None:
    assert scores(model, " mill \n", ["corn"]) == scores(model, "mill", ["corn"])


@pytest.mark.parametrize("query", ["", " \n"])
def test_a_query_without_tokens_is_an_error(query: str, model: QueryLikelihood) -> None:
    rows = model.prepare(["corn", "a"], {"query": query})

    assert [type(row) for row in rows] == [InvalidRequest, InvalidRequest]


@pytest.mark.parametrize("side", ["end", "start"])
def test_of_a_row_that_is_too_long_only_the_document_is_cut(side: str, model: QueryLikelihood) -> None:
    document = "mill " + "stream corn " * 400 + "turns"
    uncut = model._pairs.whole(RerankOptions("the mill"), document)

    (row,) = model.prepare([document], {"query": "the mill", "truncate": side})

    assert isinstance(row, Prepared)
    assert row.truncated
    ids = list(cast(Pair, row.features).ids["input_ids"])
    assert len(ids) == row.tokens == model.limit.tokens
    kept = 40
    assert ids[-8:] == uncut[-8:]
    assert (ids[:kept] == uncut[:kept]) == (side == "end")
    assert scores(model, "the mill", [document], truncate=side)[0] < 0


def test_what_is_too_long_is_an_error_alone_and_a_query_that_is_is_one_for_all(model: QueryLikelihood) -> None:
    rows = model.prepare(["corn", "corn " * 700, 5], {"query": "mill"})
    all_of_them = model.prepare(["corn", ""], {"query": "mill " * 700, "truncate": "end"})

    assert [type(row) for row in rows] == [Prepared, InputTooLong, InvalidRequest]
    assert [type(row) for row in all_of_them] == [InputTooLong, InputTooLong]


def test_max_length_bounds_rows_and_one_that_the_model_cannot_read_is_refused(qwen3: Path) -> None:
    assert load(qwen3, max_length=64).limit.tokens == 64
    with pytest.raises(ModelUnavailable, match="max_length is 9999"):
        load(rerankers.save_judge(qwen3.parent / "gpt2", "gpt2"), max_length=9_999)


def test_a_sample_has_about_as_many_tokens_as_asked_and_a_query_of_several(model: QueryLikelihood) -> None:
    (row,) = model.prepare(model.samples(200), model.sample_options)

    assert isinstance(row, Prepared)
    assert abs(row.tokens - 200) <= 5
    assert cast(Pair, row.features).query_tokens > 5


def test_workers_with_the_same_weights_agree_and_with_others_do_not(tmp_path: Path, qwen3: Path) -> None:
    other = tmp_path / "other"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        rerankers.save_judge(other, "qwen3")
        net: Any = AutoModelForCausalLM.from_pretrained(other)
        for weights in net.parameters():
            weights.data += 0.1 * torch.randn_like(weights)
        net.save_pretrained(other)
    agreement = RERANK.agreement
    assert agreement

    same, twin, different = (answer_of(load(each), agreement) for each in (qwen3, qwen3, other))

    words = load(qwen3).fingerprint
    assert words.endswith(" float32 query-likelihood")
    assert distance(same, twin, words) <= allowed_distance(words) < distance(same, different, words)


def test_only_logits_of_the_query_are_computed(qwen3: Path) -> None:
    model, rows = load(qwen3), 0

    def count(module: object, inputs: tuple[torch.Tensor], logits: torch.Tensor) -> None:
        nonlocal rows
        rows += logits.numel() // logits.shape[-1]

    model._model.get_output_embeddings().register_forward_hook(count)
    made = cast(list[Prepared], model.prepare(list(DOCUMENTS), {"query": "the mill turns"}))
    model.forward(made)

    assert rows == sum(cast(Pair, row.features).query_tokens for row in made) < sum(row.tokens for row in made) / 3


def test_a_tokenizers_bos_token_begins_each_row(tmp_path: Path) -> None:
    from tokenizers import processors

    folder = rerankers.save_judge(tmp_path / "bos", "qwen3")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|im_start|> $A", None, [("<|im_start|>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)

    (row,) = load(folder).prepare(["corn"], {"query": "mill"})

    assert isinstance(row, Prepared)
    ids = list(cast(Pair, row.features).ids["input_ids"])
    assert ids == tokenizer("".join(likelihood_frame(RerankOptions("mill"))).replace(": \n", ": corn\n"))["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_classifier_and_an_embedding_model_are_refused_as_not_causal(tmp_path: Path, tiny_model: Path) -> None:
    for folder in (rerankers.save_cross_encoder(tmp_path / "cross"), tiny_model):
        with pytest.raises(ModelUnavailable, match="no causal language model but Bert") as failure:
            load(folder)
        assert "ForCausalLM" in failure.value.hint


def test_a_model_that_reads_later_tokens_is_refused_whatever_it_is_called(tmp_path: Path) -> None:
    # XLNetLMHeadModel reads all tokens of a text, unless it is told the order in which to predict them.
    with pytest.raises(ModelUnavailable, match="depend on later tokens"):
        load(architectures.save_net(tmp_path, "xlnet", "predict", "left"))


def test_an_exported_language_model_is_refused(qwen3: Path) -> None:
    with pytest.raises(ModelUnavailable, match="language model"):
        load(qwen3, backend="onnx")


def test_without_a_kind_the_files_decide_as_before(qwen3: Path) -> None:
    assert load(qwen3, kind="auto").fingerprint.endswith(" generative Sigmoid")


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="SmolLM2-135M-Instruct is not on this host")
def test_a_small_language_model_finds_the_passage_that_answers_each_question() -> None:
    model, passages = load(SMOLLM2), list(QUESTIONS.values())

    found = [int(np.argmax(scores(model, question, passages))) for question in QUESTIONS]

    assert found == list(range(len(QUESTIONS)))


def test_the_guide_shows_the_prompt() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "rerank.md").read_text(encoding="utf-8")

    assert "...".join(likelihood_frame(RerankOptions("which river?"))) in guide
