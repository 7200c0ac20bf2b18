"""Code blocks of README and docs run: Python on clients without a server, commands up to their first action.

A block that quotes a program of docs/examples is run by that program's own test.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
import yaml

from millstream import client as client_package
from millstream import worker as worker_package
from millstream.broker.config.load import load
from millstream.cli.main import main
from millstream.client.testing import AsyncFakeClient, FakeClient

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [each.read_text(encoding="utf-8") for each in (ROOT / "docs/examples").iterdir() if each.is_file()]
TEXTS = ["a stream", "a mill", "a wheel"]
ROWS = [{"key": f"k{at}", "text": text} for at, text in enumerate(TEXTS)]

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"(^|\s)#(\s.*)?$")


class Block(NamedTuple):
    """A block of a page, its language, and its first line's number."""

    page: str
    language: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in _BLOCK.finditer(text):
            block = Block(page.name, found[1], text.count("\n", 0, found.start()) + 2, found[2])
            if block.language in languages and not any(block.text in example for example in EXAMPLES):
                yield block


def test_no_language_is_left_out() -> None:
    others = {found[1] for page in PAGES for found in _BLOCK.finditer(page.read_text(encoding="utf-8"))}

    # nginx has its own check.
    assert others <= {"json", "nginx", "python", "sh", "yaml"}


# -- Python ----------------------------------------------------------------------------------------------------


class Local(FakeClient):
    """FakeClient that takes a server's address and ignores it, with the services that the pages name."""

    def __init__(self, url: str | None = None) -> None:
        super().__init__(
            handlers={
                "reverse": lambda payloads: [each[::-1] for each in payloads],
                "flowers": lambda payloads: [{"label": len(each)} for each in payloads],
            },
        )


class Dataset:
    """Ray's and Spark's way with batches and rows, in this process."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.written = ""

    rdd = write = property(lambda self: self)

    def map_batches(self, worker: Any, *, batch_size: int, concurrency: int, num_cpus: float) -> Dataset:
        batch = worker()({name: [row[name] for row in self.rows] for name in self.rows[0]})
        return Dataset([dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)])

    def mapPartitions(self, function: Any) -> Dataset:
        rows = [type("Row", (), row)() for row in self.rows]
        return Dataset([{str(at): value for at, value in enumerate(each)} for each in function(iter(rows))])

    def toDF(self, names: list[str]) -> Dataset:
        return Dataset([dict(zip(names, row.values(), strict=True)) for row in self.rows])

    def write_parquet(self, name: str) -> None:
        self.written = name
        assert len(self.rows[0]) > 1

    parquet = write_parquet


def names_of_readers() -> dict[str, Any]:
    """Returns the names that the pages leave to their readers."""
    ray: Any = ModuleType("ray")
    ray.data = type("data", (), {"read_parquet": staticmethod(lambda name: Dataset(ROWS))})
    return {
        "Client": Local,
        "Path": Path,
        "client": Local(),
        "documents": TEXTS,
        "frame": Dataset(ROWS),
        "itertools": itertools,
        "lines": TEXTS,
        "pyarrow": pyarrow,
        "ray": ray,
        "rows": [[5.1, 3.5, 1.4, 0.2]],
        "texts": TEXTS,
    }


@pytest.mark.parametrize("page", sorted({each.page for each in blocks("python")}))
def test_python_runs_in_the_order_of_its_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []
    monkeypatch.setattr(client_package, "Client", Local)
    monkeypatch.setattr(client_package, "AsyncClient", AsyncFakeClient)
    monkeypatch.setattr(worker_package, "serve", lambda function, *, service, batch_size: served.append(service))
    names = names_of_readers()
    found = [each for each in blocks("python") if each.page == page]

    for block in found:
        monkeypatch.chdir(files_for(block, tmp_path / str(block.line)))
        # A page may show a program of its own in between, with another client.
        asyncio.run(run(block, names | {"client": Local()}))

    assert served == ["reverse"] * sum("serve(reverse" in each.text for each in found)


def files_for(block: Block, folder: Path) -> Path:
    """Makes the files that a block reads, the results of an earlier bulk run included."""
    folder.mkdir()
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "texts.parquet")
    if "vectors" in block.text and "client.bulk(" not in block.text:
        Local().bulk("embed", str(folder / "texts.jsonl"), str(folder / "vectors"), column="text", format="parquet")
    return folder


async def run(block: Block, names: dict[str, Any]) -> None:
    code = compile(block.text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, names)
    if inspect.isawaitable(result):
        await result


# -- shell and YAML --------------------------------------------------------------------------------------------

OTHER_COMMANDS = {
    ".venv/bin/python", "/opt/millstream/bin/pip", "cat", "chmod", "curl", "docker", "export", "install", "jq", "pip",
    "python", "python3", "redis-cli", "systemctl", "useradd", "uvicorn", "xargs",
}  # fmt: skip


def commands(block: Block) -> Iterator[list[str]]:
    """Yields the words of each command of a block."""
    lines = [_COMMENT.sub("", line) for line in block.text.replace("\\\n", " ").splitlines()]
    lexer = shlex.shlex("\n".join(lines), posix=True, punctuation_chars="|&;<>()\n")
    lexer.whitespace_split, lexer.whitespace, lexer.commenters = True, " \t", ""
    words: list[str] = []
    for word in lexer:
        if set(word) <= set("|&;()\n"):
            yield words
            words = []
        else:
            words.append(word)
    yield words


@pytest.mark.parametrize("block", list(blocks("sh")), ids=str)
def test_commands_exist_and_take_these_arguments(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"[\w-]+\.(?:txt|jsonl|csv|parquet|yaml)\b", block.text):
        (tmp_path / name).touch()

    for words in filter(None, map(without_assignments, commands(block))):
        if words[0] == "millstream":
            parse(main, words[1:])
        elif words[0].startswith("scripts/"):
            assert (ROOT / words[0]).exists()
        else:
            assert words[0] in OTHER_COMMANDS


def without_assignments(words: list[str]) -> list[str]:
    """Returns a command's words without variables before it, and without what is redirected."""
    kept = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))
    ends = [at for at, word in enumerate(kept) if set(word) <= set("<>")]
    return kept[: ends[0]] if ends else kept


def parse(command: click.Command, words: list[str]) -> None:
    """Parses a command line as the program does, without running it. Raises click.UsageError."""
    context = command.make_context(command.name, list(words), resilient_parsing=False)
    if isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        _, found, further = command.resolve_command(context, rest)
        assert found
        parse(found, further)


@pytest.mark.parametrize("block", list(blocks("yaml")), ids=str)
def test_settings_are_those_of_a_config_file(block: Block, tmp_path: Path) -> None:
    given = yaml.safe_load(block.text)
    if "scrape_configs" in given:
        return  # Prometheus has its own check
    if "runtime" in given:
        given = {"services": {"embed": {"model": "m", "runtime": given["runtime"]}}}
    models = given.setdefault("models", {})
    services = given.setdefault("services", {name: {"model": name} for name in models})
    for service in services.values():
        # A route has no model of its own.
        if "model" in service:
            models.setdefault(service["model"], {"type": "embedding", "model_name": "minilm"})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(given))

    load(file)


@pytest.mark.parametrize("block", list(blocks("json")), ids=str)
def test_json_is_json(block: Block) -> None:
    assert [json.loads(line) for line in block.text.splitlines()]
