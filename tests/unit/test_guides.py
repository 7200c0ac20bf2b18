"""The guides say what the code does: quoted code, the keys, the exit statuses, the versions of the server."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from millstream.broker.contract.job import PRIORITIES
from millstream.broker.contract.keys import ServiceKeys, routes_key, services_key
from millstream.broker.server.engine import FLOORS
from millstream.cli.main import exit_codes
from millstream.worker.supervision.supervisor import DRAIN_S

DOCS = Path(__file__).parents[2] / "docs"
OPERATIONS = (DOCS / "operations.md").read_text(encoding="utf-8")
FASTAPI = (DOCS / "fastapi.md").read_text(encoding="utf-8")
TRACING = (DOCS / "tracing.md").read_text(encoding="utf-8")

_LINK = re.compile(r"\]\(([\w./-]+)\)")


def quotations(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def keys() -> Iterator[tuple[str, str]]:
    """Every key of the service embed with its type: as the methods build it, their arguments as <placeholders>."""
    yield services_key(), _type(services_key)
    yield routes_key(), _type(routes_key)
    for name, method in inspect.getmembers(ServiceKeys, inspect.isfunction):
        wanted = [each for each in inspect.signature(method).parameters if each != "self"]
        if name.startswith("_") or name == "streams":
            continue
        if name == "stream":
            yield from ((ServiceKeys("embed").stream(priority), _type(method)) for priority in PRIORITIES)
        else:
            yield method(ServiceKeys("embed"), *(f"<{each}>" for each in wanted)), _type(method)


def _type(method: Callable[..., str]) -> str:
    """The first word of the docstring."""
    return (method.__doc__ or "").split(" ")[0].strip(":")


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = _LINK.findall(page.read_text(encoding="utf-8"))

    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_fastapi_page_quotes_the_example_as_it_is() -> None:
    source = (DOCS / "examples/fastapi_service.py").read_text(encoding="utf-8")

    assert len(quotations(FASTAPI)) >= 4
    assert [quoted for quoted in quotations(FASTAPI) if quoted not in source] == []


def test_the_tracing_page_quotes_the_example_as_it_is() -> None:
    source = (DOCS / "examples/traced_calls.py").read_text(encoding="utf-8")

    assert len(quotations(TRACING)) == 1
    assert [quoted for quoted in quotations(TRACING) if quoted not in source] == []


def test_the_operations_page_lists_every_key_with_its_type() -> None:
    listed = re.findall(r"^\| `(ms:[^`]+)` \| ([A-Z]+) \|", OPERATIONS, re.MULTILINE)

    assert sorted(listed) == sorted(keys())


def test_the_operations_page_lists_every_exit_status() -> None:
    listed = {int(code): names.split(", ") for code, names in re.findall(r"^\| (\d+) \| (.*) \|$", OPERATIONS, re.M)}

    assert listed == exit_codes()


def test_the_operations_page_names_the_oldest_servers_and_the_longest_drain() -> None:
    redis, valkey = (".".join(map(str, FLOORS[name])) for name in ("redis", "valkey"))

    assert f"Redis {redis} or newer, or Valkey {valkey} or newer" in OPERATIONS
    assert f"After {DRAIN_S:g} s what still runs is killed" in OPERATIONS
