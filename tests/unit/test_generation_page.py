"""docs/generation.md lists every option, finish reason, error and edge case, and quotes its examples as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from e2e.text_cases import ANSWERS, EVENTS, REFUSALS

from millstream.broker.contract import errors
from millstream.broker.contract.errors import Cancelled, MillstreamError
from millstream.broker.contract.generation import DEADLINE, LENGTH, STOP, GenerateOptions

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "generation.md").read_text(encoding="utf-8")
EXAMPLES = {"yaml": "chat.yaml", "python": "generate_text.py"}


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def first_cells(heading: str) -> list[str]:
    """The code in the first column of the section's table."""
    return re.findall(r"^\| `(\w+)` \|", section(heading), re.MULTILINE)


def test_every_option_is_listed_in_its_order() -> None:
    assert first_cells("Options") == list(GenerateOptions._fields)


def test_every_finish_reason_is_listed() -> None:
    assert first_cells("Finish reasons") == [STOP, LENGTH, DEADLINE]


def test_the_codes_of_errors_exist() -> None:
    codes = {
        each.code for each in vars(errors).values() if isinstance(each, type) and issubclass(each, MillstreamError)
    }
    columns = re.findall(r"^\| [^|]+ \| (`[^|]+`) \| [^|]+ \|$", section("Errors"), re.MULTILINE)
    listed = {code for column in columns for code in re.findall(r"`(\w+)`", column)}

    assert len(listed) >= 9
    assert listed - codes == set()


def test_each_edge_case_is_a_test_and_has_the_code_that_the_test_sees() -> None:
    codes = {case: refusal.error.code for case, refusal in REFUSALS.items()}
    codes |= dict.fromkeys([*ANSWERS, *EVENTS], "none") | {"caller that leaves": Cancelled.code}
    listed = re.findall(r"^\| ([^|]+) \| `?(\w+)`? \| [^|]+ \|$", section("Edge cases"), re.MULTILINE)[1:]
    tests = (Path(__file__).parents[1] / "e2e" / "test_llm.py").read_text(encoding="utf-8")

    assert len(listed) == 15
    assert {case: code for case, code in listed if codes.get(case) != code} == {}
    assert [name for name in EVENTS.values() if f"\ndef {name}(" not in tests] == []


def test_the_bytes_of_a_token_are_those_of_the_formula() -> None:
    layers, heads, size, tokens = 30, 3, 64, 16 * (500 + 300)

    assert f"{2 * layers * heads * size * 2:,} bytes a token in bfloat16" in PAGE
    assert f"{2 * layers * heads * size * 4:,} in float32" in PAGE
    assert f"`max_batch_tokens: {tokens}`, which is {2 * layers * heads * size * 4 * tokens / 1e6:.0f} MB" in PAGE


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_page_quotes_its_examples_as_they_are(kind: str) -> None:
    source = (DOCS / "examples" / EXAMPLES[kind]).read_text(encoding="utf-8")
    quotations = re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)

    assert quotations
    assert [quoted for quoted in quotations if quoted not in source] == []
