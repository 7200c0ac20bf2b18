"""The product's sentences: how docstrings start, which words they do without, how names are formed.

Readers search, and many have English as a second language: a condition is "if" or "when", "where" is a place, and each
concept has one name, the field's own.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("broker", "telemetry", "worker", "client", "cli")
FILES = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "broker").rglob("*.lua"))

NO_STARTS = ("What", "Where", "Of", "Those", "The same", "So many", "First", "Also")
"""A docstring starts with a verb in the third person or with the noun that it describes."""

METAPHORS = ("crowd", "company", "betters", "stranger", "strangers", "herd", "prospects")
PARTICIPLES = ("told", "heard", "left", "taken", "sent", "kept", "wanted")
"""As a whole name of a function, variable or field these say neither what is done nor what a thing is."""

LEAST_IF_FOR_A_WHERE = 3.0
"""`if` and `when` in sentences, for each `where`. httpcore has 16."""


def docstrings(file: str) -> Iterator[tuple[int, str]]:
    """The docstrings of a module, its classes, functions and constants, with their lines."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                text = statement.value.value
                if isinstance(text, str):
                    yield statement.lineno, text


def comments(file: str) -> Iterator[tuple[int, str]]:
    text = (ROOT / file).read_text(encoding="utf-8")
    if file.endswith(".lua"):
        yield from ((at, line.partition("--")[2]) for at, line in enumerate(text.splitlines(), 1) if "--" in line)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def sentences(file: str) -> Iterator[tuple[int, str]]:
    if file.endswith(".py"):
        yield from docstrings(file)
    yield from comments(file)


def names(file: str) -> Iterator[tuple[int, str]]:
    """What a module defines: functions, arguments, variables, fields."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name


@pytest.mark.parametrize("file", FILES)
def test_a_docstring_starts_with_a_verb_or_a_noun(file: str) -> None:
    wrong = re.compile(rf"({'|'.join(NO_STARTS)})\b")

    assert [f"{file}:{line}: {text[:60]}" for line, text in docstrings(file) if wrong.match(text)] == []


@pytest.mark.parametrize("file", [*FILES, *SCRIPTS])
def test_sentences_have_no_metaphors(file: str) -> None:
    wrong = re.compile(rf"\b({'|'.join(METAPHORS)})\b", re.IGNORECASE)

    assert [f"{file}:{line}: {found[0]}" for line, text in sentences(file) if (found := wrong.search(text))] == []


@pytest.mark.parametrize("file", FILES)
def test_no_name_is_a_bare_participle(file: str) -> None:
    assert [f"{file}:{line}: {name}" for line, name in names(file) if name.strip("_") in PARTICIPLES] == []


def test_conditions_are_said_with_if_and_when() -> None:
    words = [
        word
        for file in [*FILES, *SCRIPTS]
        for _, text in sentences(file)
        for word in re.findall(r"[a-z]+", text.lower())
    ]
    conditions, places = words.count("if") + words.count("when"), words.count("where")

    assert conditions >= LEAST_IF_FOR_A_WHERE * places, f"{conditions} if or when, {places} where"
