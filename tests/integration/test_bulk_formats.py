"""Parquet and OpenAI's batch files through a real server and real workers."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from support import eventually
from workers import remove, working

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import BulkProgress, Client
from millstream.client.bulk.manifest import read_manifest

TESTS = Path(__file__).parents[1]


class Ended(Exception):
    """Ends a run, as the end of its process would."""


def end_after(shards: int) -> Callable[[BulkProgress], None]:
    def report(progress: BulkProgress) -> None:
        if len(read_manifest(progress.output)[0].notes) >= shards:
            raise Ended

    return report


def service(kind: Any, **model: Any) -> ServiceSpec:
    runtime = Runtime.model_validate({"batch_size": 64})
    name = f"test-{kind}-{uuid.uuid4().hex[:8]}"
    return ServiceSpec(name=name, model=ModelSpec(type=kind, **model), model_ref="m", runtime=runtime)


@pytest.fixture(scope="module")
def services(server: EmbeddedServer) -> Iterator[dict[str, str]]:
    """Vectors [n, n] of the number that a text says, and texts that are said word by word."""
    every = {"vectors": service("custom", handler="mill:vectors"), "texts": service("echo-stream")}
    with working(server.url, *every.values(), folder=TESTS):
        yield {which: each.name for which, each in every.items()}
    for each in every.values():
        remove(server.url, each.name)


def test_parquet_goes_in_and_out_and_a_run_that_ended_goes_on(
    client: Client, services: dict[str, str], tmp_path: Path
) -> None:
    source, output = tmp_path / "in.parquet", tmp_path / "out"
    texts = [None if row % 100 == 7 else str(row) for row in range(500)]
    pq.write_table(pa.table({"n": texts, "key": range(500)}), source, row_group_size=130)
    given: dict[str, Any] = {"column": "n", "id_column": "key", "format": "parquet", "shard_rows": 50}

    with pytest.raises(Ended):
        client.bulk(services["vectors"], source, output, progress=end_after(3), **given)
    before = {part.name: part.stat().st_mtime_ns for part in output.glob("part-*")}
    done = client.bulk(services["vectors"], source, output, **given)

    assert before
    assert {name: (output / name).stat().st_mtime_ns for name in before} == before
    assert (done.rows, done.failed, done.share) == (500, 5, 1.0)
    table = pa.concat_tables(map(pq.read_table, sorted(output.glob("part-*.parquet"))))
    assert table["row"].to_pylist() == list(range(500))
    assert table["vector"].to_pylist() == [None if row % 100 == 7 else [row, row] for row in range(500)]
    pq.write_table(pa.table({"n": texts, "key": range(1, 501)}), source, row_group_size=130)
    with pytest.raises(InvalidRequest, match=r"cannot go on: (input\.size|the input differs in rows 0 to 49)"):
        client.bulk(services["vectors"], source, output, **given)


def test_a_batch_file_of_embeddings_and_one_of_texts_have_a_line_for_each_request(
    client: Client, services: dict[str, str], tmp_path: Path
) -> None:
    def run(name: str, which: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        (tmp_path / name).write_text("".join(json.dumps(each) + "\n" for each in requests))
        output = tmp_path / f"{name}-out"
        given: dict[str, Any] = {"input_format": "openai", "format": "openai", "shard_rows": 50}
        with pytest.raises(Ended):
            client.bulk(services[which], tmp_path / name, output, progress=end_after(1), **given)
        client.bulk(services[which], tmp_path / name, output, **given)
        assert (output / "errors.jsonl").read_text() == ""
        lines = [json.loads(line) for part in sorted(output.glob("part-*")) for line in part.read_text().splitlines()]
        assert [line["custom_id"] for line in lines] == [each["custom_id"] for each in requests]
        return [line["response"]["body"] for line in lines]

    def request(number: int, url: str, **body: Any) -> dict[str, Any]:
        return {"custom_id": f"id-{number}", "method": "POST", "url": url, "body": {"model": "m", **body}}

    vectors = run(
        "vectors.jsonl",
        "vectors",
        [request(at, "/v1/embeddings", input=[str(at)] * (at % 3 + 1)) for at in range(120)],
    )
    texts = run(
        "texts.jsonl",
        "texts",
        [request(at, "/v1/completions", prompt=f"{at} two three", max_tokens=at % 3 + 1) for at in range(120)],
    )

    for at, body in enumerate(vectors):
        assert [each["embedding"] for each in body["data"]] == [[at, at]] * (at % 3 + 1)
    said = [body["choices"][0]["text"].split() for body in texts]
    assert said == [[str(at), "two", "three"][: at % 3 + 1] for at in range(120)]


FLAKY = """
from pathlib import Path

def answer(payloads):
    mended = (Path(__file__).parent / "mended").exists()
    return [each * 2 if mended or each % 10 != 3 else ValueError("a stone in the mill") for each in payloads]
"""


def test_failed_rows_that_succeed_later_are_merged_and_leave_nothing_on_the_server(
    client: Client, server: EmbeddedServer, connection: Connection, tmp_path: Path
) -> None:
    (tmp_path / "flaky.py").write_text(FLAKY)
    (tmp_path / "in.jsonl").write_text("".join(f"{row}\n" for row in [*range(300), '"text"']))
    output, flaky = tmp_path / "out", service("custom", handler="flaky:answer")

    with working(server.url, flaky, folder=tmp_path):
        first = client.bulk(flaky.name, tmp_path / "in.jsonl", output, shard_rows=50)
        (tmp_path / "mended").touch()
        second = client.retry_failed(output)

    assert (first.failed, second.rows, second.failed) == (31, 31, 0)
    lines = [json.loads(line) for part in sorted(output.glob("part-*")) for line in part.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(301))
    assert [line["result"] for line in lines] == [2 * row for row in range(300)] + ["texttext"]
    assert (output / "errors.jsonl").read_bytes() == b""
    pattern = f"ms:{{{flaky.name}}}:call:*"
    eventually(lambda: not list(connection.client.scan_iter(match=pattern, count=1000)))
    remove(server.url, flaky.name)
