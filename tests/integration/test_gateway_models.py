"""Real models over HTTP: one embedding model and one reranker, in the shapes of OpenAI, Cohere, Jina and TEI."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cohere
import httpx
import numpy as np
import openai
import pytest
from gateways import LONG_S, Running, gateway
from workers import working

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection

pytestmark = pytest.mark.early

TEXTS = ["the stream", "turns the mill"]
DOCUMENTS = ["the miller grinds", "a mill", "the stream turns the mill"]


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An embedding model with prompts, and a reranker."""
    from rerankers import save_bi_encoder, save_cross_encoder

    home = tmp_path_factory.mktemp("gateway")
    return save_bi_encoder(home / "embedder", tiny_model), save_cross_encoder(home / "reranker")


@pytest.fixture(scope="module")
def running(server: EmbeddedServer, folders: tuple[Path, Path]) -> Iterator[Running]:
    """A gateway in front of the services `docs` and `ranks` alone."""
    prefix = f"test-{uuid.uuid4().hex[:8]}"
    specs = [
        ServiceSpec(
            name=name,
            model=ModelSpec.model_validate({"type": kind, "model_name": str(folder), "device": "cpu"}),
            model_ref="m",
            runtime=Runtime(),
        )
        for name, kind, folder in zip(("docs", "ranks"), ("embedding", "reranker"), folders, strict=True)
    ]
    with ExitStack() as stack:
        stack.callback(clear, server.url, prefix)
        stack.enter_context(working(server.url, *specs, prefix=prefix))
        yield stack.enter_context(gateway(server.url, prefix=prefix))


def clear(url: str, prefix: str) -> None:
    connection = Connection(url)
    connection.client.unlink(*connection.client.scan_iter(f"{prefix}:*", count=1000))
    connection.close()


@pytest.fixture(scope="module")
def expected(folders: tuple[Path, Path]) -> dict[str, Any]:
    """Vectors of TEXTS, without a prompt and as queries, and scores of DOCUMENTS for a query, by the libraries."""
    from sentence_transformers import CrossEncoder, SentenceTransformer

    embedder = SentenceTransformer(str(folders[0]), device="cpu")
    ranker = CrossEncoder(str(folders[1]), device="cpu")
    return {
        "plain": embedder.encode(TEXTS),
        "query": embedder.encode(TEXTS, prompt_name="query"),
        "scores": ranker.predict([("corn mill", each) for each in DOCUMENTS]),
    }


@pytest.fixture
def sdk(running: Running) -> Iterator[cohere.ClientV2]:
    with httpx.Client(timeout=LONG_S) as http:
        yield cohere.ClientV2(api_key="none", base_url=running.url, httpx_client=http)


# -- OpenAI ----------------------------------------------------------------------------------------------------------


def test_embeddings_are_the_model_s(running: Running, expected: dict[str, Any]) -> None:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
        found = client.embeddings.create(model="docs", input=TEXTS)
        cut = client.embeddings.create(model="docs", input=TEXTS, dimensions=4, encoding_format="float")
        listed = [each.id for each in client.models.list()]
        shown = client.models.retrieve("docs")
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("nothing")

    np.testing.assert_allclose([each.embedding for each in found.data], expected["plain"], atol=1e-5)
    assert {len(each.embedding) for each in cut.data} == {4}
    assert found.usage.total_tokens > len(TEXTS)
    assert (listed, shown.id, caught.value.code) == (["docs", "ranks"], "docs", "model_not_found")


def test_the_only_service_of_a_type_need_not_be_named(running: Running, expected: dict[str, Any]) -> None:
    answer = running.post("/v1/embeddings", {"input": TEXTS}).json()

    np.testing.assert_allclose([each["embedding"] for each in answer["data"]], expected["plain"], atol=1e-5)
    assert answer["model"] == "docs"


def test_a_service_of_another_type_is_a_bad_request(running: Running) -> None:
    answer = running.post("/v1/embeddings", {"input": "a", "model": "ranks"})

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


# -- Cohere ----------------------------------------------------------------------------------------------------------


def test_cohere_s_embed_has_each_type_and_its_input_types_choose_the_prompt(
    sdk: cohere.ClientV2, expected: dict[str, Any]
) -> None:
    found = sdk.embed(
        model="docs",
        texts=TEXTS,
        input_type="search_query",
        embedding_types=["float", "base64", "binary", "ubinary"],
    )

    vectors = np.array(found.embeddings.float_, np.float32)
    np.testing.assert_allclose(vectors, expected["query"], atol=1e-5)
    encoded = [np.frombuffer(base64.b64decode(each), "<f4") for each in found.embeddings.base64 or []]
    np.testing.assert_array_equal(encoded, vectors)
    bits = np.packbits(vectors > 0, axis=1)
    assert found.embeddings.ubinary == bits.tolist()
    assert found.embeddings.binary == (bits.astype(int) - 128).tolist()
    assert found.texts == TEXTS
    assert found.meta
    assert found.meta.billed_units
    assert found.meta.billed_units.input_tokens


def test_cohere_s_embed_takes_contents_and_dimensions(sdk: cohere.ClientV2) -> None:
    inputs: Any = [{"content": [{"type": "text", "text": each}]} for each in TEXTS]

    found = sdk.embed(
        model="docs", inputs=inputs, input_type="search_document", embedding_types=["float"], output_dimension=4
    )

    assert [len(each) for each in found.embeddings.float_ or []] == [4, 4]


def test_cohere_s_rerank_sorts_and_cuts(sdk: cohere.ClientV2, expected: dict[str, Any]) -> None:
    found = sdk.rerank(model="ranks", query="corn mill", documents=DOCUMENTS, top_n=2, priority=0)

    order = np.argsort(-expected["scores"])[:2]
    assert [each.index for each in found.results] == order.tolist()
    np.testing.assert_allclose([each.relevance_score for each in found.results], expected["scores"][order], atol=1e-5)
    assert found.id


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"texts": ["a"], "embedding_types": ["int8"]}, "embedding_types"),
        ({"texts": ["a"], "images": ["data:"]}, "images"),
        ({"input_type": "search_query"}, "texts"),
        ({"inputs": [{"content": [{"type": "image_url"}]}]}, "images are not supported"),
    ],
)
def test_what_cohere_s_embed_does_not_support_is_said(running: Running, body: dict[str, Any], word: str) -> None:
    answer = running.post("/v2/embed", {"model": "docs", **body})

    assert answer.status_code == 400
    assert word in answer.json()["message"]


def test_cohere_s_library_gets_our_errors(sdk: cohere.ClientV2) -> None:
    with pytest.raises(cohere.NotFoundError) as caught:
        sdk.rerank(model="nothing", query="q", documents=["a"])

    assert "no such model" in caught.value.body["message"]


# -- Jina and TEI ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
def test_jina_s_rerank_returns_documents_and_usage(running: Running, path: str, expected: dict[str, Any]) -> None:
    answer = running.post(
        path, {"model": "ranks", "query": "corn mill", "documents": DOCUMENTS, "top_n": 1, "return_documents": True}
    ).json()

    (best,) = answer["results"]
    assert best["index"] == int(np.argmax(expected["scores"]))
    assert best["document"] == {"text": DOCUMENTS[best["index"]]}
    assert answer["usage"]["total_tokens"] > 0


def test_tei_s_embed_is_a_bare_list_of_unit_vectors(running: Running, expected: dict[str, Any]) -> None:
    found = np.array(running.post("/embed", {"inputs": TEXTS, "truncate": True}).json())
    named = np.array(running.post("/tei/docs/embed", {"inputs": TEXTS[0], "prompt_name": "query"}).json())

    unit = expected["plain"] / np.linalg.norm(expected["plain"], axis=1, keepdims=True)
    np.testing.assert_allclose(found, unit, atol=1e-5)
    query = expected["query"][0] / np.linalg.norm(expected["query"][0])
    np.testing.assert_allclose(named, [query], atol=1e-5)


def test_tei_s_rerank_is_a_bare_sorted_list(running: Running) -> None:
    body = {"query": "corn mill", "texts": DOCUMENTS, "return_text": True}

    found = running.post("/rerank", body).json()
    raw = running.post("/tei/ranks/rerank", {**body, "raw_scores": True, "return_text": False}).json()

    assert [each["score"] for each in found] == sorted((each["score"] for each in found), reverse=True)
    assert [each["text"] for each in found] == [DOCUMENTS[each["index"]] for each in found]
    assert all(0 < each["score"] < 1 for each in found)
    assert [each["index"] for each in raw] == [each["index"] for each in found]
    np.testing.assert_allclose([1 / (1 + np.exp(-each["score"])) for each in raw], [each["score"] for each in found])
    assert set(raw[0]) == {"index", "score"}


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"inputs": ["mill " * 200]}, 413, "Validation"),
        ({"inputs": ["a"] * 2_049}, 413, "Validation"),
        ({"inputs": [[1, 2]]}, 422, "Validation"),
        ({"inputs": ["a"], "prompt_name": "poem"}, 422, "Validation"),
    ],
)
def test_tei_s_errors_have_its_shape(running: Running, body: dict[str, Any], status: int, kind: str) -> None:
    answer = running.post("/embed", body)

    assert (answer.status_code, answer.json()["error_type"]) == (status, kind)
    assert answer.json()["error"]


def test_tei_s_info_names_the_service(running: Running) -> None:
    assert running.get("/info").json()["model_id"] == "docs"
    assert running.get("/health").status_code == 200
