"""Types of models are told apart in broker/contract/operations.py alone: a new one is a record and a module."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import yaml

from millstream.broker.config.check import check
from millstream.broker.config.file import ConfigFile
from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.config.yaml import Document, Place
from millstream.broker.contract import operations
from millstream.broker.contract.embedding import EmbedOptions
from millstream.broker.contract.errors import InvalidRequest, ModelUnavailable
from millstream.broker.contract.operations import BY_OP, CALL, EMBED, OPERATIONS, RERANK, RUNNABLE, ModelType, Operation
from millstream.broker.contract.rerank import RerankOptions
from millstream.client.testing import FakeClient
from millstream.worker import models
from millstream.worker.models import echo

ROOT = Path(__file__).parents[2]
EVERY = list(OPERATIONS.values())
LOADED = [each for each in EVERY if each.runs and importlib.util.find_spec(each.loader.partition(":")[0])]
"""Operations whose module exists."""


def service(kind: ModelType, **model: object) -> ServiceSpec:
    spec = ModelSpec.model_validate({"type": kind, "model_name": "m", **model})
    return ServiceSpec(name="mill", model=spec, model_ref="m", runtime=Runtime())


def test_each_type_that_config_yaml_may_name_has_one_record_and_a_name_of_its_own_on_the_wire() -> None:
    assert list(OPERATIONS) == list(get_args(ModelType))
    assert all(kind == each.type for kind, each in OPERATIONS.items())
    assert len(BY_OP) == len(OPERATIONS)
    assert all(op == each.op and 0 < len(op) <= 64 for op, each in BY_OP.items())


@pytest.mark.parametrize("operation", EVERY, ids=OPERATIONS)
def test_the_defaults_of_a_type_are_valid_and_a_file_gets_them(operation: Operation) -> None:
    handler = "handler: a:b" if operation.needs_code else "model_name: m"
    text = f"models: {{m: {{type: {operation.type}, {handler}}}}}\nservices: {{s: {{model: m}}}}\n"

    document = Document("config.yaml", yaml.safe_load(text), {(): Place("config.yaml")})
    file = check(document)

    assert document.problems == []
    assert file.services["s"].runtime == Runtime.model_validate(operation.defaults)
    assert operation.defaults.keys() <= Runtime.model_fields.keys()


@pytest.mark.parametrize("operation", LOADED, ids=lambda each: each.type)
def test_the_loader_of_a_type_is_a_function_of_its_module_with_the_one_signature(operation: Operation) -> None:
    loader = models.loader_of(service(operation.type))

    assert f"{loader.__module__}:{loader.__name__}" == operation.loader
    assert list(inspect.signature(loader).parameters) == list(inspect.signature(echo.load).parameters)


def test_each_type_has_a_worker() -> None:
    assert [each.type for each in EVERY if each.type not in RUNNABLE] == []


def test_a_type_without_a_worker_is_neither_loaded_nor_called(monkeypatch: pytest.MonkeyPatch) -> None:
    without = replace(OPERATIONS["llm"], loader="")
    monkeypatch.setattr(ModelSpec, "operation", property(lambda spec: without))

    with pytest.raises(ModelUnavailable, match="'llm'"):
        models.load(service("llm"), "cpu", 1)
    with pytest.raises(InvalidRequest, match="cannot call"):
        FakeClient(services={"chat": "llm"}).submit("chat", ["a"])


@pytest.mark.parametrize("operation", [EMBED, RERANK, CALL], ids=lambda each: each.type)
def test_an_option_that_a_type_does_not_have_is_refused(operation: Operation) -> None:
    valid = dict(operation.example)

    assert operation.check(valid) == sum(len(str(text).encode()) for text in valid.values())
    with pytest.raises(InvalidRequest):
        operation.check({**valid, "colour": "blue"})


@pytest.mark.parametrize("operation", EVERY, ids=OPERATIONS)
def test_what_a_record_says_fits_together(operation: Operation) -> None:
    assert not (operation.needs_code and operation.needs_weights)
    assert operation.needs_weights or not (operation.one_forward or operation.organization or operation.libraries)
    assert operation.one_forward == (operation.agreement is not None)
    if operation.agreement:
        operation.check(operation.agreement.options)
    operation.check(operation.example)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"query": None},
        {"query": 5},
        {"query": ["q"]},
        {"query": "q", "scores": "softmax"},
        {"query": "q", "scores": ["raw"]},
        {"query": "q", "scores": ""},
        {"query": "q", "instruction": 5},
        {"query": "q", "truncate": "middle"},
        {"query": "q", "truncate": {}},
        {"query": "q", "top_n": 3},
    ],
)
def test_a_rerankers_options_are_read_with_distrust(options: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        RerankOptions.read(options)  # type: ignore[arg-type]


def test_options_survive_the_way_to_the_worker() -> None:
    for rerank in (RerankOptions("q"), RerankOptions("q", "raw", "i", "start")):
        assert RerankOptions.read(rerank.json()) == rerank
    for embed in (EmbedOptions(), EmbedOptions("end", "query", None, 8, True, "binary")):
        assert EmbedOptions.read(embed.json()) == embed


def test_half_a_character_in_a_query_ends_no_worker() -> None:
    assert RerankOptions.read({"query": "\ud800"}).query == "\ud800"


def test_a_streaming_service_has_one_row_a_job_and_no_cache() -> None:
    from millstream.client.rows import split_rows

    parts, _ = split_rows(service("echo-stream"), ["a", "b", "c"])

    assert sorted(part.rows for part in parts) == [(0,), (1,), (2,)]
    with pytest.raises(ValueError, match="echo-stream has no cache"):
        ServiceSpec(name="s", model=ModelSpec(type="echo-stream"), model_ref="m", runtime=Runtime(enable_cache=True))


def test_the_table_needs_neither_numpy_nor_pydantic_nor_another_part_of_the_product() -> None:
    program = f"""
import sys, {operations.__name__}
foreign = sorted(name for name in sys.modules if name.startswith("millstream."))
print(*[name for name in foreign if not name.startswith("millstream.broker.contract") and name != "millstream.broker"])
print(*{{"numpy", "pydantic", "redis"}} & sys.modules.keys())
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert told.stdout.split() == []


def test_the_schema_of_the_file_knows_every_type() -> None:
    definitions = ConfigFile.model_json_schema()["$defs"]

    assert definitions[ModelSpec.__name__]["properties"]["type"]["enum"] == list(OPERATIONS)


NAMES = {*OPERATIONS, *BY_OP}
RECORDS = {name for name, value in vars(operations).items() if isinstance(value, Operation)}
EXCEPTIONS = {
    ("broker/contract/entry_codec.py", "call"): "the field of an entry that has the id of a detached call",
    ("broker/queue/streams.py", "stream"): "the type of key that a reply goes to",
    ("cli/embed.py", "embedding"): "the key of a vector in the command's JSON",
    ("cli/main.py", "embed"): "the name of a command",
    ("cli/main.py", "generate"): "the name of a command",
    ("client/detached_id.py", "call"): "the group of a pattern that has the id of a detached call",
    ("client/openai/answers.py", "embedding"): "the key of a vector in an answer of OpenAI's shape",
    ("client/openai/requests.py", "echo"): "the field of a request of OpenAI's shape that asks for the prompt, too",
    ("gateway/api/terms.py", "stream"): "the field of a request that asks for events",
    ("worker/engines/upstream_rows.py", "embedding"): "the key of a vector in a server's answer",
    ("worker/engines/upstream_text.py", "stream"): "the field of a request that asks for events",
    ("worker/models/loading/weights.py", "embedding"): "the attribute of a module that has its table of vectors",
}
"""Names that stand for something else, by file."""


def deciding(node: ast.AST) -> Sequence[ast.AST]:
    """The parts of a comparison, the keys of a dict, a pattern or an index, or a string that is the name of a type."""
    match node:
        case ast.Compare():
            return [node.left, *node.comparators]
        case ast.Dict():
            return [key for key in node.keys if key]
        case ast.Subscript():
            return [node.slice]
        case ast.MatchValue():
            return [node.value]
        case ast.Constant() if node.value in OPERATIONS:
            return [node]
    return []


def told_apart(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Where a program depends on the name of a type or an operation, or compares a record."""
    for node in ast.walk(tree):
        for side in deciding(node):
            for part in ast.walk(side):
                if isinstance(part, ast.Constant) and part.value in NAMES:
                    yield part.lineno, str(part.value)
                if isinstance(part, ast.Name) and part.id in RECORDS:
                    yield part.lineno, part.id


def test_no_module_but_the_table_tells_types_apart() -> None:
    found: dict[tuple[str, str], int] = {}
    for folder in ("broker", "telemetry", "client", "worker", "gateway", "cli"):
        for path in (ROOT / folder).rglob("*.py"):
            file = path.relative_to(ROOT).as_posix()
            if file == "broker/contract/operations.py":
                continue
            for line, name in told_apart(ast.parse(path.read_text(encoding="utf-8"))):
                found.setdefault((file, name), line)

    assert {f"{file}:{line}: {name}" for (file, name), line in found.items() if (file, name) not in EXCEPTIONS} == set()
    assert EXCEPTIONS.keys() - found.keys() == set()


@pytest.mark.parametrize(
    "program",
    [
        'if spec.model.type == "reranker": ...',
        'if op not in ("call", "echo"): ...',
        'OPS = {"embedding": 1}',
        'OPS["embed"]',
        'match op:\n    case "rerank": ...',
        "if spec.model.operation is CALL: ...",
        "if op == EMBED.op: ...",
        'services.only("embedding")',
    ],
)
def test_each_way_to_tell_types_apart_is_found(program: str) -> None:
    assert list(told_apart(ast.parse(program)))
