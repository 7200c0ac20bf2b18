"""Text that grows: how a running job's output is kept for a successor, and how it is shown to its client.

A job of an operation that streams has one row. Its output is a list of records. A record is what one step of the engine
made: a piece of text, and bytes with which a successor can go on (for a language model, token ids). The server keeps
all records of a job in one STRING, which only grows. The client gets the text of new records as a delta: the text, and
its offset in the whole text, in code points, so that it can drop what it has and notice what it missed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from millstream.broker.contract.errors import Malformed

MAX_PARTIAL_BYTES = 8 * 1024 * 1024
"""Bytes of one job's records after which no more are added: its reply has the rest of the text."""

_LENGTHS = struct.Struct("<II")
"""Bytes of a record's state, and of its text."""


class Record(NamedTuple):
    """One step's output. `state` is the engine's own; either part may be empty."""

    text: str
    state: bytes = b""


class Delta(NamedTuple):
    """A piece of a job's text. `offset`: code points of the text before it."""

    offset: int
    text: str


def encode_record(record: Record) -> bytes:
    text = record.text.encode()
    return _LENGTHS.pack(len(record.state), len(text)) + record.state + text


def decode_records(blob: bytes) -> list[Record]:
    """The records of a job, oldest first. Raises Malformed if `blob` does not end with a whole record."""
    records, at = [], 0
    while at < len(blob):
        if len(blob) - at < _LENGTHS.size:
            raise Malformed("a record is cut off")
        state, text = _LENGTHS.unpack_from(blob, at)
        at += _LENGTHS.size
        if len(blob) - at < state + text:
            raise Malformed("a record is cut off")
        try:
            piece = blob[at + state : at + state + text].decode()
        except UnicodeDecodeError as error:
            raise Malformed(f"a record's text is not UTF-8: {error}") from error
        records.append(Record(piece, blob[at : at + state]))
        at += state + text
    return records


def text_of(records: Iterable[Record]) -> str:
    """The whole text of a job's records."""
    return "".join(record.text for record in records)


def encode_delta(delta: Delta) -> bytes:
    """The offset in decimal digits, a space, and the text in UTF-8."""
    return b"%d %s" % (delta.offset, delta.text.encode())


def decode_delta(blob: bytes) -> Delta:
    """Raises Malformed."""
    offset, space, text = blob.partition(b" ")
    if not (space and offset.isdigit() and len(offset) <= 16):
        raise Malformed("a delta without its offset")
    try:
        return Delta(int(offset), text.decode())
    except UnicodeDecodeError as error:
        raise Malformed(f"a delta's text is not UTF-8: {error}") from error
