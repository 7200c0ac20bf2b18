"""Reads config.yaml and the environment into one plain tree, and records the place of every key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from millstream.broker.contract.errors import ConfigError, did_you_mean

PREFIX = "MILLSTREAM_"
"""Start of variables that set values: MILLSTREAM_SERVICES__A__RUNTIME__PRESET sets services.a.runtime.preset."""

KeyPath = tuple[str, ...]
_NAMED = {("models",), ("services",)}
_MERGE = "tag:yaml.org,2002:merge"
_TEXT = "tag:yaml.org,2002:str"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_OCTAL = re.compile(r"[-+]?0[0-7_]*[1-7][0-7_]*")


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """The place of a value: a line of a file; or, with line 0, an environment variable or a whole file."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One error in a configuration. As text it is one line: place, key, reason with fix."""

    place: Place
    path: KeyPath
    reason: str

    def __str__(self) -> str:
        text = ": ".join(filter(None, [str(self.place), dotted(self.path), self.reason]))
        return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


@dataclass(slots=True)
class Document:
    """The tree of a file, the place of each key in it, and the problems found so far.

    `written` has the original text of each value that is not a string, for messages: YAML may change its look.
    """

    source: str
    tree: dict[str, object] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    written: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: KeyPath) -> Place:
        """Returns the place of `path`, or of the closest key above it that has one."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, Place(self.source, 1))

    def report(self, path: KeyPath, reason: str, place: Place | None = None) -> None:
        self.problems.append(Problem(place or self.place(path), path, reason))


def dotted(path: KeyPath) -> str:
    return ".".join(path)


def read(path: Path) -> Document:
    """Returns the file as a Document. Raises ConfigError if it is no YAML mapping in UTF-8."""
    document = Document(str(path))
    text = _text(path)
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise _failure(Place(document.source, 1), "the file is empty; it needs `models:` and `services:`")
        tree = _Reader(loader, document).plain(root, ())
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _failure(Place(document.source, line), _syntax(error)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _failure(Place(document.source, line), "not valid YAML: a control character; delete it") from error
    except RecursionError as error:
        raise _failure(Place(document.source, 1), "nested too deeply, or an alias that holds itself") from error
    if not isinstance(tree, dict):
        raise _failure(Place(document.source, 1), "must be a mapping with `models:` and `services:`")
    document.tree = tree
    return document


def overlay(document: Document, environ: Mapping[str, str]) -> None:
    """Overrides values of the file by MILLSTREAM_SECTION__..__KEY variables.

    Names match in any case; an underscore matches any sign that is no letter or digit. An empty variable counts as
    unset. A variable can change a model or a service, but not add one.
    """
    for name, value in sorted(environ.items()):
        keys = name[len(PREFIX) :].split("__")
        if name.upper().startswith(PREFIX) and len(keys) > 1 and value:
            _set(document, Place(name), keys, value)


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise _failure(Place(str(path)), "no such file; create it, or name another") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _failure(Place(str(path)), f"cannot be read: {reason}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _failure(Place(str(path), line), "not UTF-8; save the file in UTF-8") from error


def _syntax(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or str(error)
    fix = "; indent with spaces, not tabs" if "'\\t'" in problem else ""
    return f"not valid YAML: {problem}{fix}"


def _failure(place: Place, reason: str) -> ConfigError:
    return ConfigError(str(Problem(place, (), reason)))


class _Reader:
    """Turns YAML nodes into plain values. Records places, and reports duplicate keys, in the document."""

    def __init__(self, loader: yaml.SafeLoader, document: Document) -> None:
        self._loader = loader
        self._document = document
        self._flattened: set[yaml.MappingNode] = set()

    def plain(self, node: yaml.Node, path: KeyPath) -> object:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, path) for item in node.value]
        if reason := _misread(node):
            self._document.report(path, reason, self._place(node))
        try:
            return self._loader.construct_object(node)
        except ValueError as error:  # a date such as 2025-02-30
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, object]:
        if node not in self._flattened:
            self._flattened.add(node)
            self._find_duplicates(node, path)
            self._loader.flatten_mapping(node)
        result: dict[str, object] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                self._document.places[(*path, key.value)] = self._place(key)
                if isinstance(value, yaml.ScalarNode) and value.tag != _TEXT and value.value:
                    self._document.written[(*path, key.value)] = value.value
                result[key.value] = self.plain(value, (*path, key.value))
            else:
                self._document.report(path, "a key must be a plain name", self._place(key))
        return result

    def _find_duplicates(self, node: yaml.MappingNode, path: KeyPath) -> None:
        first: dict[str, Place] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            if key.value in first:
                reason = f"duplicate key, first at line {first[key.value].line}; keep one"
                self._document.report((*path, key.value), reason, self._place(key))
            first.setdefault(key.value, self._place(key))

    def _place(self, node: yaml.Node) -> Place:
        return Place(self._document.source, node.start_mark.line + 1)


def _misread(node: yaml.Node) -> str:
    """Returns why YAML reads a number differently from how it looks, or an empty string.

    YAML 1.1 has numbers to the bases 60 and 8.
    """
    if not isinstance(node, yaml.ScalarNode) or node.style is not None or node.tag not in _NUMBERS:
        return ""
    if ":" in node.value:
        return f'YAML reads {node.value} as a number to the base 60; write "90s", "5m" or "2h", or put text in quotes'
    if _OCTAL.fullmatch(node.value):
        return f"YAML reads {node.value} as a number to the base 8; leave out the zeros, or put text in quotes"
    return ""


def _set(document: Document, place: Place, keys: list[str], value: str) -> None:
    node = document.tree
    path: KeyPath = ()
    for key in keys[:-1]:
        path = (*path, _existing(key, node))
        if path[-1] not in node and path[:-1] in _NAMED:
            return document.report(path, _no_such(path[-1], node, document.source), place)
        below = node.get(path[-1])
        if below is None:
            below = node[path[-1]] = {}
            document.places[path] = place
        if not isinstance(below, dict):
            return document.report(
                path, f"has a single value at {document.place(path)}; make it a mapping there", place
            )
        node = below
    name = _existing(keys[-1], node)
    node[name] = value
    document.written.pop((*path, name), None)
    document.places[(*path, name)] = place
    return None


def _no_such(name: str, known: Iterable[str], source: str) -> str:
    close = did_you_mean(name, known)
    return f"no such entry; did you mean {close}?" if close else f"no such entry; add it to {source} first"


def _existing(key: str, node: Mapping[str, object]) -> str:
    """Returns the key of `node` that a variable's `key` names, or `key` in lower case if there is none."""
    plain = _plain_name(key)
    return next((name for name in node if _plain_name(name) == plain), key.lower())


def _plain_name(name: str) -> str:
    return re.sub(r"\W", "_", name).lower()
