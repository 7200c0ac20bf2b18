"""Writes docs/reference from the code: commands, configuration, metrics, Python. `--check` only tells what is old."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

import millstream.client as api
from millstream.broker.config.schema import schema
from millstream.broker.contract import errors
from millstream.broker.contract.operations import OPERATIONS
from millstream.cli.main import main as cli
from millstream.telemetry.metrics import LABELS, METRICS, UP, UP_HELP

FOLDER = Path(__file__).parents[1] / "docs" / "reference"

Section = Mapping[str, Any]


# -- the command line ------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """Returns the page of all commands, as their --help says it."""
    lines = [
        "# Command line",
        "",
        "Made from the code by `scripts/reference.py`. Each command says the same with `--help`.",
    ]
    lines += ["", "## Exit codes", "", "| code | meaning |", "|---|---|"]
    lines += [
        f"| {code} | {meaning} |" for code, meaning in re.findall(r"^ +(\d+)  (.+)$", cli.epilog or "", re.MULTILINE)
    ]
    for name, command in _commands(cli, "millstream"):
        lines += ["", f"## {name}", "", *_command(name, command)]
    return "\n".join(lines) + "\n"


def _commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for word in group.list_commands(context):
        command = group.get_command(context, word)
        assert command, f"{path} lists {word} and does not have it"
        name = f"{path} {word}"
        yield name, command
        if isinstance(command, click.Group):
            yield from _commands(command, name)


def _command(name: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=name)
    yield f"`{' '.join([name, *command.collect_usage_pieces(context)])}`"
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        yield ""
        # \b begins a paragraph whose lines stay as they are.
        yield from ["```", *paragraph.splitlines()[1:], "```"] if paragraph.startswith("\b") else [_joined(paragraph)]
    if command.epilog:
        yield from ["", _joined(command.epilog)]
    records = [each for parameter in command.params if (each := parameter.get_help_record(context))]
    if records and not isinstance(command, click.Group):
        yield from ["", "| option | meaning |", "|---|---|"]
        yield from [f"| `{_cell(option)}` | {_cell(meaning)} |" for option, meaning in records]


# -- config.yaml -----------------------------------------------------------------------------------------------------


def configuration_page() -> str:
    """Returns the page of all keys of config.yaml."""
    whole = schema()
    definitions: Section = whole["$defs"]
    lines = [
        "# config.yaml",
        "",
        "Made from the code by `scripts/reference.py`. `millstream config schema` prints the same for editors, and",
    ]
    lines += [
        "`millstream config show --origin` the values in effect. [tuning.md](../tuning.md) says how to choose limits."
    ]
    lines += ["", "## Defaults by the type of the model", "", "| type | defaults that differ |", "|---|---|"]
    lines += [
        f"| `{each.type}` | {', '.join(f'`{key}: {_value(value)}`' for key, value in each.defaults.items()) or '-'} |"
        for each in OPERATIONS.values()
    ]
    for title, section in _sections(whole, definitions):
        lines += ["", f"## {title}", "", "| key | value | default | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{key}` | {_cell(_kind(value, definitions))} | {_default(value)} | {_cell(value['description'])} |"
            for key, value in section["properties"].items()
        ]
    return "\n".join(lines) + "\n"


def _sections(whole: Section, definitions: Section) -> Iterator[tuple[str, Section]]:
    """The sections of the file in the order in which they are named, each once, under the keys that lead there."""
    found = [("The file", whole)]
    done: set[str] = set()
    while found:
        title, section = found.pop(0)
        yield title, section
        for key, value in section["properties"].items():
            for name in re.findall(r"#/\$defs/(\w+)", str(value)):
                if name not in done and "properties" in definitions[name]:
                    done.add(name)
                    parent = "" if title == "The file" else f"{title}."
                    many = ".NAME" if "additionalProperties" in str(value) else ""
                    found.append((f"{parent}{key}{many}", definitions[name]))


def _kind(value: Section, definitions: Section) -> str:
    """The values that a key may have, in words."""
    if "enum" in value:
        return ", ".join(f"`{each}`" for each in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return "a mapping" if "properties" in definitions[name] else _kind(definitions[name], definitions)
    if "anyOf" in value:
        kinds = [_kind(each, definitions) for each in value["anyOf"]]
        return " or ".join(dict.fromkeys(kinds))
    words = {
        "integer": "whole number",
        "object": "a mapping",
        "null": "none",
        "boolean": "true or false",
        "array": "a list",
    }
    kind = str(value.get("type", "any"))
    text = words.get(kind, "text" if kind == "string" else kind)
    return text + (f" of at least {value['minimum']}" if "minimum" in value else "")


def _default(value: Section) -> str:
    return f"`{_value(value['default'])}`" if "default" in value else ""


def _value(value: object) -> str:
    """Returns a value as YAML writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


# -- Python ----------------------------------------------------------------------------------------------------------


def python_page() -> str:
    """Returns the page of the names of millstream.client and of its errors."""
    lines = [
        "# Python",
        "",
        "Made from the code by `scripts/reference.py`. All names are those of `millstream.client`.",
    ]
    for name in sorted(api.__all__, key=lambda each: (not each[0].isupper(), each)):
        lines += ["", f"## {name}", "", *_documented(name, getattr(api, name))]
    lines += [
        "",
        "## Errors",
        "",
        "All are subclasses of `MillstreamError`, from `millstream.broker.contract.errors`. A call may be",
    ]
    lines += [
        "sent again if its error is retryable.",
        "",
        "| error | code | retryable | meaning |",
        "|---|---|---|---|",
    ]
    known = inspect.getmembers(errors, lambda each: inspect.isclass(each) and issubclass(each, errors.MillstreamError))
    for name, cls in known:
        meaning = _joined(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0])
        lines.append(f"| `{name}` | `{cls.code}` | {'yes' if cls.retryable else 'no'} | {_cell(meaning)} |")
    return "\n".join(lines) + "\n"


# -- metrics ---------------------------------------------------------------------------------------------------------


def metrics_page() -> str:
    """Returns the page of all metrics of `millstream exporter`."""
    lines = [
        "# Metrics",
        "",
        "Made from the code by `scripts/reference.py`. `millstream exporter` serves them to Prometheus.",
        "[monitoring.md](../monitoring.md) says how to run it. All but the first have the label `service`.",
        "",
        "| metric | type | label | unit | meaning |",
        "|---|---|---|---|---|",
        f"| `{UP}` | gauge | | | {_cell(UP_HELP)} |",
    ]
    for each in METRICS:
        label = f"`{each.label}`" if each.label else ""
        lines.append(f"| `{each.name}` | {each.kind} | {label} | {each.unit} | {_cell(each.help)} |")
    lines += ["", "A histogram has series with `_bucket`, `_sum` and `_count` behind its name.", "", "## Labels", ""]
    lines += [
        f"- `{label}`: {', '.join(f'`{value}`' for value in values) or 'names'}" for label, values in LABELS.items()
    ]
    return "\n".join(lines) + "\n"


class _Hidden:
    """A default value that is a function."""

    def __repr__(self) -> str:
        return "..."


def _documented(name: str, found: object) -> Iterator[str]:
    if not inspect.isclass(found):
        yield from _function(name, found)
        return
    yield from _paragraphs(found.__doc__ or "")
    for member, value in vars(found).items():
        if member.startswith("_") and member != "__init__":
            continue
        plain = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        plain = plain.fget if isinstance(plain, property) else plain
        if not inspect.isfunction(plain) or not plain.__doc__:
            continue
        title = f"{name}.{member}" if member != "__init__" else name
        yield from ["", f"### {title}", "", *_function(title, plain, is_property=isinstance(value, property))]


def _function(name: str, found: Any, *, is_property: bool = False) -> Iterator[str]:
    plain = inspect.unwrap(found)
    if not is_property:
        parameters = [
            each.replace(
                annotation=inspect.Parameter.empty,
                default=_Hidden() if inspect.isfunction(each.default) else each.default,
            )
            for each in inspect.signature(plain).parameters.values()
            if each.name not in ("self", "cls")
        ]
        start = "await " if inspect.iscoroutinefunction(plain) else ""
        yield f"`{start}{name}{inspect.Signature(parameters)}`"
        yield ""
    yield from _paragraphs(plain.__doc__ or "")


def _paragraphs(text: str) -> Iterator[str]:
    for at, paragraph in enumerate(inspect.cleandoc(text).split("\n\n")):
        if at:
            yield ""
        # Lists and code keep their lines.
        yield paragraph if re.search(r"^( {4}|- )", paragraph, re.MULTILINE) else _joined(paragraph)


def _joined(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _joined(text).replace("|", "\\|")


PAGES: Mapping[str, Callable[[], str]] = {
    "cli.md": cli_page,
    "configuration.md": configuration_page,
    "metrics.md": metrics_page,
    "python.md": python_page,
}


def main() -> int:
    """Writes the pages; with --check writes none, and returns 1 if one is old."""
    made = {FOLDER / name: page() for name, page in PAGES.items()}
    old = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" not in sys.argv[1:]:
        FOLDER.mkdir(exist_ok=True)
        for path in old:
            path.write_text(made[path], encoding="utf-8")
    for path in old:
        sys.stdout.write(f"{path.relative_to(FOLDER.parents[1])}\n")
    return int(bool(old) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
