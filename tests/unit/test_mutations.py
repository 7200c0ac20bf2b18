"""The list of breaks names what is there: each line once in its file, each test; so does the reliability page."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TypedDict

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")

PROMISES = range(1, 20)

_PATH = re.compile(r"`([\w./-]+\.(?:py|lua|toml)|scripts/\w+)(?:::\w+)*`")
_TEST = re.compile(r"`(tests/[\w./]+\.py)::(\w+)`")


class Mutation(TypedDict):
    promise: int
    breaks: str
    file: str
    find: str
    replace: str
    test: str


MUTATIONS: list[Mutation] = tomllib.loads((ROOT / "scripts" / "mutations.toml").read_text(encoding="utf-8"))["mutation"]


def has_test(file: str, name: str) -> bool:
    """Whether `file`, or a contract it runs, has a test of this name."""
    sources = [ROOT / file, *(ROOT / "tests/contracts").glob("*.py")]
    return any(f"def {name}(" in source.read_text(encoding="utf-8") for source in sources)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation["breaks"])
def test_a_break_stands_once_in_its_file_and_has_a_test(mutation: Mutation) -> None:
    file, _, test = mutation["test"].partition("::")

    assert (ROOT / mutation["file"]).read_text(encoding="utf-8").count(mutation["find"]) == 1
    assert mutation["find"] != mutation["replace"]
    assert has_test(file, test.rpartition("::")[2])


def test_every_promise_is_broken_more_than_once() -> None:
    broken = [mutation["promise"] for mutation in MUTATIONS]

    assert {promise for promise in PROMISES if broken.count(promise) < 3} == set()


def test_the_reliability_page_has_each_promise_once() -> None:
    assert re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE) == [str(promise) for promise in PROMISES]


def test_the_reliability_page_names_files_and_tests_that_exist() -> None:
    assert _PATH.findall(PAGE)
    assert [path for path in _PATH.findall(PAGE) if not (ROOT / path).exists()] == []
    assert [each for each in _TEST.findall(PAGE) if not has_test(*each)] == []


def test_words_that_no_break_has_are_an_error_and_run_no_test() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "mutate.py"), "no", "such", "break"]

    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert (ended.returncode, ended.stderr.strip()) == (1, "no break has all these words: no such break")
