"""`millstream embed`: sends texts through the queue and prints their vectors."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, cast

import click
import numpy as np

from millstream.broker.contract.errors import InvalidRequest, MillstreamError, PartialFailure
from millstream.broker.contract.job import Json, Vectors
from millstream.broker.contract.operations import EMBED
from millstream.cli import options
from millstream.cli.calling import DEFAULT_WAIT_S, find_service
from millstream.cli.completion import complete_services
from millstream.cli.options import SecondsRange
from millstream.cli.server import find_server
from millstream.client import Client

Format = Literal["json", "npy", "text"]


@click.command()
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option(
    "--service",
    metavar="NAME",
    shell_complete=complete_services,
    help="By default the only registered embedding service.",
)
@click.option("--priority", type=click.Choice(["realtime", "normal", "batch"]), default="normal", show_default=True)
@click.option("--timeout", type=SecondsRange(min=0, min_open=True), help="Seconds for the whole call.")
@click.option(
    "--truncate", type=click.Choice(["none", "start", "end"]), help="Cut this side of texts that are too long."
)
@click.option("--input-type", type=click.Choice(["query", "document", "none"]), help="Use the model's prompt for it.")
@click.option("--prompt", help="Text to put before each TEXT, instead of the model's prompt.")
@click.option("--dimensions", type=click.IntRange(min=1), metavar="NUMBER", help="Keep this many dimensions.")
@click.option("--normalize/--no-normalize", default=None, help="Whether to scale vectors to length 1.")
@click.option(
    "--wait",
    "wait_s",
    type=SecondsRange(min=0),
    default=DEFAULT_WAIT_S,
    show_default=True,
    help="Seconds to wait for a worker if none is alive.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Standard input is a JSON array of strings, or one JSON string per line."
)
@click.option("--format", "layout", type=click.Choice(["json", "npy", "text"]), default="json", show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="A file, instead of standard output.")
@options.url
@options.prefix
def embed(
    texts: tuple[str, ...],
    service: str | None,
    wait_s: float,
    as_json: bool,
    layout: Format,
    output: Path | None,
    url: str | None,
    prefix: str | None,
    **call: str | float | bool | None,
) -> None:
    """Embed each TEXT, or each line of standard input, through the queue.

    Prints one line of JSON per text: {"index": 0, "embedding": [...]}; a sparse model's embedding is {"indices": [...],
    "values": [...]}. --format text prints only the numbers, --format npy one float32 array. If a text fails, standard
    error has a line for it, and the output has no line (json), an empty line (text) or a row of NaN (npy).
    """
    _check_output(output, layout)
    rows = _texts(texts, as_json)
    target = find_server(url, prefix)
    name = find_service(
        target.url, target.prefix, service, EMBED, lambda operation: operation.results == "vectors", wait_s=wait_s
    )
    with Client(target.url, prefix=target.prefix) as client:
        vectors, errors = _call(client, rows, {"service": name, **call})
    _check_dense(layout, vectors)
    _write(encode(layout, vectors), output)
    for index, error in sorted(errors.items()):
        click.echo(f"millstream: text {index}: {error}", err=True)
    if errors:
        click.get_current_context().exit(PartialFailure.exit_code)


def _check_output(output: Path | None, layout: Format) -> None:
    """Raises UsageError if the output cannot be written. Called before the work, so that none is lost."""
    if output and not output.parent.is_dir():
        raise click.UsageError(f"--output: there is no folder '{output.parent}'.")
    if layout == "npy" and not output and sys.stdout.isatty():
        raise click.UsageError("an array cannot be printed on a terminal: give --output FILE.")


def _texts(arguments: Sequence[str], as_json: bool) -> list[str]:
    """Returns the texts to embed. Raises UsageError if there are none, InvalidRequest if the JSON is invalid."""
    if arguments and as_json:
        raise click.UsageError("--json reads standard input: give no TEXT with it.")
    if arguments:
        return list(arguments)
    if sys.stdin.isatty():
        raise click.UsageError("no texts: give some as arguments or on standard input.")
    # Not decoded strictly: a line that is not UTF-8 fails alone, and the other lines are embedded.
    text = sys.stdin.buffer.read().decode(errors="surrogateescape")
    if as_json:
        return parse_json(text)
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def parse_json(text: str) -> list[str]:
    """Returns the strings of a JSON array, or of one JSON string per line.

    Raises InvalidRequest if it is not JSON, or with one line for each value that is not a string.
    """
    values = _array(text)
    strings = [value for value in values if isinstance(value, str)]
    if len(strings) < len(values):
        raise InvalidRequest(
            "\n".join(
                f"text {index}: not a string but {json.dumps(value, ensure_ascii=False)[:60]}"
                for index, value in enumerate(values)
                if not isinstance(value, str)
            )
        )
    return strings


def _array(text: str) -> list[object]:
    if text.lstrip().startswith("["):
        return cast(list[object], _parse(text, "standard input"))
    lines = enumerate(text.split("\n"), start=1)
    return [_parse(line, f"line {number}") for number, line in lines if line.strip()]


def _parse(text: str, source: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{source} is not JSON: {error}") from None


def _call(
    client: Client, texts: Sequence[str], call: Mapping[str, str | float | bool | None]
) -> tuple[list[Vectors | None], Mapping[int, MillstreamError]]:
    """Returns one vector per text, None for a text that failed, and the errors by index.

    Raises the error itself if the whole call failed.
    """
    try:
        return list(client.embed(texts, **call)), {}  # type: ignore[arg-type]
    except PartialFailure as partial:
        return cast("list[Vectors | None]", partial.results), partial.errors


def _check_dense(layout: Format, vectors: Sequence[Vectors | Mapping[str, Json] | None]) -> None:
    if layout != "json" and any(isinstance(vector, dict) for vector in vectors):
        raise InvalidRequest("the model's vectors are sparse", hint="use --format json")


def encode(layout: Format, vectors: Sequence[Vectors | Mapping[str, Json] | None]) -> Iterator[bytes]:
    """Yields the output in pieces. Numbers have enough digits to give the same float32 when read."""
    if layout == "npy":
        yield _npy(cast("Sequence[Vectors | None]", vectors))
        return
    for index, vector in enumerate(vectors):
        if isinstance(vector, dict):
            yield json.dumps({"index": index, "embedding": vector}, separators=(",", ":")).encode() + b"\n"
            continue
        numbers = [] if vector is None else [str(number) for number in vector]
        if layout == "text":
            yield " ".join(numbers).encode() + b"\n"
        elif vector is not None:
            yield f'{{"index":{index},"embedding":[{",".join(numbers)}]}}\n'.encode()


def _npy(vectors: Sequence[Vectors | None]) -> bytes:
    dimension = next((len(vector) for vector in vectors if vector is not None), 0)
    missing = np.full(dimension, np.nan, dtype=np.float32)
    rows = [missing if vector is None else vector for vector in vectors]
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(rows, dtype=np.float32).reshape(len(rows), dimension), allow_pickle=False)
    return buffer.getvalue()


def _write(pieces: Iterable[bytes], output: Path | None) -> None:
    if output is None:
        _copy(pieces, sys.stdout.buffer)
        return
    try:
        with output.open("wb") as file:
            _copy(pieces, file)
    except OSError as error:
        raise click.FileError(str(output), error.strerror) from None


def _copy(pieces: Iterable[bytes], sink: BinaryIO) -> None:
    for piece in pieces:
        sink.write(piece)
    sink.flush()
