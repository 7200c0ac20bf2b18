"""ARCHITECTURE.md and docs/decisions.md are only worth reading while they name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
DECISIONS = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")

PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

MOST_LINES = 8
"""Lines of one decision."""

METAPHORS = ("crowd", "company", "betters", "strangers?", "herd", "prospects")

LEAST_IF_FOR_A_WHERE = 3.0
"""`if` and `when` in all pages, for each `where`, as in the sentences of the code."""

_PATH = re.compile(r"`([\w.*-][\w./*-]*(?:/|\.(?:py|lua|md|yml|toml)))`")
_ANSWER = re.compile(r"^\| (?P<question>.+) \| `(?P<file>[\w./-]+)` \|$", re.MULTILINE)


def section(text: str, heading: str) -> str:
    """The text between `heading`, "## Title", and the next heading of its level."""
    return text.split(f"{heading}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("page", [ARCHITECTURE, DECISIONS], ids=["ARCHITECTURE.md", "docs/decisions.md"])
def test_a_page_names_only_paths_that_exist(page: str) -> None:
    named = _PATH.findall(page)

    assert named
    assert [path for path in named if not list(ROOT.glob(path))] == []


def test_each_question_of_where_is_it_decided_is_answered_by_one_file_that_exists() -> None:
    _, _, *rows = section(ARCHITECTURE, "## Where is it decided...").strip().splitlines()

    answers = [_ANSWER.match(row) for row in rows]

    assert len(rows) >= 25
    assert [row for row, answer in zip(rows, answers, strict=True) if answer is None] == []
    assert [answer["file"] for answer in answers if answer and not (ROOT / answer["file"]).is_file()] == []


def test_the_folders_of_the_architecture_page_are_all_packages() -> None:
    listed = set(re.findall(r"^\| `([\w/]+)/` \|", section(ARCHITECTURE, "## Folders"), re.MULTILINE))

    packages = {
        str(init.parent.relative_to(ROOT))
        for folder in ("broker", "telemetry", "worker", "client", "cli")
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert packages - listed == {"broker"}


def test_decisions_are_numbered_in_order_and_short_and_name_context_choice_and_cost() -> None:
    _, *decisions = DECISIONS.split("\n## ")
    bodies = [decision.partition("\n")[2].strip().splitlines() for decision in decisions]

    assert [decision.partition(".")[0] for decision in decisions] == [str(n + 1) for n in range(len(decisions))]
    assert [body[0] for body in bodies if len(body) > MOST_LINES] == []
    assert {tuple(re.findall(r"^- (\w+):", "\n".join(body), re.MULTILINE)) for body in bodies} == {
        ("Context", "Choice", "Cost")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_no_metaphors(page: Path) -> None:
    wrong = re.compile(rf"\b({'|'.join(METAPHORS)})\b", re.IGNORECASE)

    assert wrong.findall(page.read_text(encoding="utf-8")) == []


def test_pages_say_conditions_with_if_and_when() -> None:
    words = [word for page in PAGES for word in re.findall(r"[a-z]+", page.read_text(encoding="utf-8").lower())]
    conditions, places = words.count("if") + words.count("when"), words.count("where")

    assert conditions >= LEAST_IF_FOR_A_WHERE * places, f"{conditions} if or when, {places} where"
