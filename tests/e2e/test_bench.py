"""The benchmarks' entry runs and prints its table; `millstream bench` measures a service that runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bystander import Bystander
from e2e.cli_support import Shell
from e2e.sites import echo
from workers import LONG_S, working

from millstream.broker.config.spec import ModelSpec
from millstream.broker.contract.codec import decode_inputs
from millstream.broker.contract.job import Priority
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.contract.operations import RERANK
from millstream.broker.transport.connection import Connection

pytestmark = pytest.mark.early

ROOT = Path(__file__).parents[2]
WORDS = ("--seconds", "0.3", "--concurrency", "4")
SPEC = echo("")


@pytest.fixture(scope="module")
def working_service(url: str) -> Iterator[str]:
    with working(url, SPEC):
        yield SPEC.name


@pytest.fixture
def shell(tmp_path: Path, url: str) -> Shell:
    return Shell(tmp_path, url)


def benchmark(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=LONG_S, check=False)


def test_the_benchmarks_print_a_table_with_references_verdicts_and_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    words = ["queue", "--quick", "--repeats", "1", "--seconds", "0.05", "--json", str(file)]

    ended = benchmark(*words)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.search(r"^in flight +rows/s +raw rows/s +/ raw", ended.stdout, re.MULTILINE)
    assert re.search(r"^one at a time, threads: p50 / raw loop +[\d.]+ +<= 2.2 +(met|MISSED)$", ended.stdout, re.M)
    assert re.search(r"^machine: \d+ cores", ended.stdout, re.MULTILINE)
    found = json.loads(file.read_text())["suites"]["queue"]
    assert all(value["median"] > 0 for table in found["tables"] for row in table["rows"] for value in row[1:4])


def test_a_quick_run_is_not_written_into_the_docs() -> None:
    page = ROOT / "docs" / "performance.md"
    before = page.read_text()

    ended = benchmark("queue", "--quick", "--write-docs")

    assert (ended.returncode, page.read_text()) == (2, before)


def test_a_running_service_is_measured_with_calls_of_its_own(shell: Shell, working_service: str, url: str) -> None:
    ended = shell.run("bench", working_service, *WORDS, "--rows", "3", "--json")

    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert (found["rows"], found["priority"], found["errors"]) == (3, "batch", {})
    assert found["calls"] > 0
    assert found["rows_per_s"] == pytest.approx(3 * found["calls"] / found["seconds"])
    assert 0 < found["p50_ms"] <= found["p99_ms"] < 1000 * found["seconds"]


def test_its_calls_are_of_so_many_rows_and_let_others_go_first(shell: Shell, url: str) -> None:
    connection = Connection(url, name="tests")
    service = Bystander(connection, echo(""))

    with (
        service.living(),
        shell.background("bench", service.name, "--rows", "3", "--length", "7", "--concurrency", "1"),
    ):
        claim = service.claim_one()

    assert claim.address.priority is Priority.BATCH
    assert claim.job
    inputs, _ = decode_inputs(claim.job.body, claim.job.rows)
    assert [len(str(text)) for text in inputs] == [7, 7, 7]
    connection.close()


def test_a_reranker_is_asked_a_query(shell: Shell, url: str) -> None:
    connection = Connection(url, name="tests")
    model = ModelSpec(type="reranker", model_name="some/model")
    service = Bystander(connection, echo("").model_copy(update={"model": model}))

    with service.living(), shell.background("bench", service.name, "--concurrency", "1"):
        claim = service.claim_one()

    assert claim.job
    assert claim.job.op == "rerank"
    assert decode_inputs(claim.job.body, claim.job.rows)[1] == RERANK.example
    connection.close()


def test_its_table_says_how_the_service_was_called(shell: Shell, working_service: str) -> None:
    heading, row = shell.run("bench", working_service, *WORDS).out.decode().splitlines()

    assert heading.split("  ")[0] == "SERVICE"
    assert re.fullmatch(rf"{working_service} +1 +4 +\d+ +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +-", row)


def test_a_service_without_workers_is_not_called(shell: Shell, url: str) -> None:
    connection = Connection(url, name="tests")
    service = Bystander(connection, echo(""))

    assert "no worker" in shell.run("bench", service.name, *WORDS).line(6)

    assert connection.client.xlen(ServiceKeys(service.name).stream(Priority.BATCH)) == 0
    connection.close()


def test_what_is_refused_is_counted_by_its_code(shell: Shell, url: str) -> None:
    """The only worker answers nothing: one job fits and is given up, the other caller is refused again and again."""
    connection = Connection(url, name="tests")
    service = Bystander(connection, echo("", max_queue_size=1, total_timeout=1.0))
    with service.living():
        ended = shell.run("bench", service.name, "--seconds", "1", "--timeout", "1.5", "--concurrency", "2", "--json")

    found = json.loads(ended.out)
    assert (ended.code, found["calls"], found["p50_ms"]) == (1, 0, None)
    assert found["errors"]["queue_full"] >= 2
    assert found["errors"]["deadline_exceeded"] == 1
    connection.close()
