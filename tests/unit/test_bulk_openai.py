"""Batch files of OpenAI's API through bulk runs: each request has its own options, and one line of output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.contract.errors import InvalidRequest, ModelFailed
from millstream.client.bulk.custom_ids import check_unique
from millstream.client.bulk.items import Mark
from millstream.client.bulk.opening import open_source
from millstream.client.testing import GENERATOR, RERANKER, SERVICE, FakeClient


def request(custom_id: Any, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "m", **body}}


def embed(custom_id: Any, texts: Any, **body: Any) -> dict[str, Any]:
    return request(custom_id, "/v1/embeddings", input=texts, **body)


def complete(custom_id: str, prompt: Any, **body: Any) -> dict[str, Any]:
    return request(custom_id, "/v1/completions", prompt=prompt, **body)


class Files:
    """A folder with the batch file `requests`, and the output of runs of it."""

    def __init__(self, folder: Path, *requests: Any) -> None:
        self.source, self.output = folder / "batch.jsonl", folder / "out"
        self.source.write_text("".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in requests))

    def run(self, client: FakeClient, service: str, **more: Any) -> Any:
        given = {"input_format": "openai", "format": "openai", **more}
        return client.bulk(service, self.source, self.output, **given)

    def lines(self) -> list[Any]:
        parts = sorted(self.output.glob("part-*.jsonl"))
        return [json.loads(line) for part in parts for line in part.read_text().splitlines()]

    def errors(self) -> list[Any]:
        return [json.loads(line) for line in (self.output / "errors.jsonl").read_text().splitlines()]


def test_each_request_of_embeddings_has_one_line_with_all_its_vectors(tmp_path: Path) -> None:
    files, client = (
        Files(tmp_path, *(embed(f"id-{n}", [f"a {n}", f"b {n}"] if n % 2 else f"c {n}") for n in range(9))),
        FakeClient(dim=4),
    )

    done = files.run(client, SERVICE, shard_rows=4)

    assert (done.rows, done.failed, done.share) == (9, 0, 1.0)
    lines = files.lines()
    assert [line["custom_id"] for line in lines] == [f"id-{n}" for n in range(9)]
    assert len({line["id"] for line in lines}) == 9
    assert all(line["error"] is None and line["response"]["status_code"] == 200 for line in lines)
    body = lines[3]["response"]["body"]
    assert (
        np.asarray([each["embedding"] for each in body["data"]], "f4") == np.asarray(client.embed(["a 3", "b 3"]))
    ).all()
    # The fake counts the words of a text, and two more; a job's tokens are divided among its rows.
    assert sum(line["response"]["body"]["usage"]["total_tokens"] for line in lines) == 13 * 4


def test_options_of_a_body_are_those_of_its_row_alone(tmp_path: Path) -> None:
    files, client = (
        Files(tmp_path, embed("a", "text", dimensions=2), embed("b", "text"), embed("c", "more", dimensions=2)),
        FakeClient(dim=4),
    )

    files.run(client, SERVICE)

    assert [len(line["response"]["body"]["data"][0]["embedding"]) for line in files.lines()] == [2, 4, 2]
    # Rows with equal options travel together.
    assert sorted(len(call.inputs) for call in client.calls) == [1, 2]


def test_texts_have_their_own_options_and_usage(tmp_path: Path) -> None:
    chat = request("c", "/v1/chat/completions", messages=[{"role": "user", "content": "one two three"}], max_tokens=2)
    files = Files(tmp_path, complete("a", ["one two", "three"], max_tokens=1), chat, complete("d", "x", seed=3))

    files.run(FakeClient(), GENERATOR)

    first, second, third = (line["response"]["body"] for line in files.lines())
    assert [each["text"] for each in first["choices"]] == ["one ", "three"]
    assert first["usage"]["completion_tokens"] == 2
    assert second["choices"][0]["message"]["content"] == "one two "
    assert second["choices"][0]["finish_reason"] == "length"
    assert third["object"] == "text_completion"
    assert third["model"] == GENERATOR


def test_requests_to_rank_documents_have_their_own_queries(tmp_path: Path) -> None:
    files = Files(
        tmp_path,
        request("a", "/v1/rerank", query="corn", documents=["a mill", "corn"], top_n=1),
        request("b", "/v1/rerank", query="mill", documents=["a mill", "corn"]),
    )

    files.run(FakeClient(), RERANKER)

    found = [[each["index"] for each in line["response"]["body"]["results"]] for line in files.lines()]
    assert found == [[1], [0, 1]]


def test_a_request_that_fails_is_an_error_in_both_shapes_and_harms_no_other(tmp_path: Path) -> None:
    files = Files(
        tmp_path,
        embed("good", "a"),
        embed("part", ["b", "bad"]),
        embed("field", "a", temperature=1),
        embed("value", "a", dimensions=0),
        complete("elsewhere", "a"),
        "no JSON",
        embed("last", "c"),
    )

    done = files.run(FakeClient(errors={"bad": ModelFailed("no")}), SERVICE)

    assert (done.rows, done.failed) == (7, 5)
    assert [line["custom_id"] for line in files.lines()] == ["good", "last"]
    errors = files.errors()
    assert [error["row"] for error in errors] == [1, 2, 3, 4, 5]
    assert [error["id"] for error in errors] == ["part", "field", "value", "elsewhere", None]
    lines = [error["openai"] for error in errors]
    assert [line["custom_id"] for line in lines] == ["part", "field", "value", "elsewhere", None]
    assert [line["response"] and line["response"]["status_code"] for line in lines] == [500, 400, 400, 400, None]
    assert [line["response"]["body"]["error"]["param"] for line in lines[1:3]] == ["temperature", "dimensions"]
    assert lines[4]["error"]["code"] == "invalid_request"


def test_a_repeated_custom_id_is_refused_with_both_lines_before_anything_is_sent(tmp_path: Path) -> None:
    lines = [embed(f"id-{n}", "a") for n in range(6)]
    files = Files(tmp_path, lines[0], "", "no JSON", embed(None, "a"), *lines[1:], lines[3], embed(None, "a"), lines[1])
    client = FakeClient()

    with pytest.raises(InvalidRequest, match=r"custom_id 'id-3' of line 10 is that of line 7, too"):
        files.run(client, SERVICE, shard_rows=2)

    assert client.calls == []
    assert files.lines() == []
    files.source.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert files.run(client, SERVICE).rows == 6


@given(st.lists(st.text("ab", max_size=3)))
def test_the_first_line_that_repeats_an_id_is_found(names: list[str]) -> None:
    seen: dict[str, int] = {}
    lines = list(enumerate(names, 1))
    expected = next(((line, seen[name]) for line, name in lines if seen.setdefault(name, line) < line), None)

    refusal = ""
    try:
        check_unique(lambda: iter(lines))
    except InvalidRequest as error:
        refusal = str(error)

    assert bool(refusal) == (expected is not None)
    if expected:
        assert f"of line {expected[0]} is that of line {expected[1]}, too" in refusal


def test_different_ids_of_one_hash_are_no_repeat() -> None:
    class Alike(str):
        def __hash__(self) -> int:
            return 7

    check_unique(lambda: enumerate(map(Alike, "abc"), 1))


def test_every_line_comes_once_from_any_shard_on(tmp_path: Path) -> None:
    files = Files(tmp_path, *(embed(f"id-{n}", ["x"] * (n % 3 + 1)) for n in range(8)))
    source = open_source(files.source, "openai", None, None, 3)

    shards = list(source.read_shards(Mark()))

    # A shard ends when it has three texts: requests have 1, 2 or 3 of them.
    assert [len(shard.rows) for shard in shards] == [3, 3, 3, 3, 3]
    assert [shard.end.row for shard in shards] == [2, 3, 5, 6, 8]
    for at, shard in enumerate(shards):
        assert str(list(source.read_shards(shard.begin))) == str(shards[at:])
        assert source.digest(shard.begin.position, shard.end.position) == shard.digest


def test_answers_may_be_written_as_json_lines_or_parquet(tmp_path: Path) -> None:
    files = Files(tmp_path, embed("a", "text"))

    files.run(FakeClient(dim=4), SERVICE, format="jsonl")

    (line,) = files.lines()
    assert (line["row"], line["id"], line["result"]["object"]) == (0, "a", "list")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimensions": 4}, "'dimensions' has no effect"),
        ({"column": "body"}, "no columns"),
        ({"input_format": "jsonl"}, "--input-format openai"),
        ({"format": "npy"}, "npy"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_any_call(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    files, client = Files(tmp_path, embed("a", "text")), FakeClient()

    with pytest.raises(InvalidRequest, match=message):
        files.run(client, SERVICE, **arguments)

    assert client.calls == []
