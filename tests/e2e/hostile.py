"""Entries that no client of ours writes: what a hostile or broken program with access to the server might add."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

from millstream.broker.contract.entry_codec import FIELDS

CLIENT = b"mallory"
HUGE = 16 * 2**20 + 1
"""Bytes."""

Flat = list[bytes]
"""An entry's names and values in turn, as XADD takes them: a name may come twice."""

_NUMBERS = (b"x", b"-1", b"1e9", b"nan", b"inf", b"0x10", b"\xef\xbc\x91", b"9" * 30, b"1.5", b" 1", b"+1", b"\x00")
_IDS = (b"0" * 31, b"0" * 33, b"A" * 32, b"../" * 10 + b"xx", b"{" + b"0" * 30 + b"}", b"0" * 31 + b"\n", b"\xff" * 32)
_NAMES = (b"{x}", b"a b", b"a\nb", b"a:b", b"}:reply:x", b"a" * 65, b"\xff\xfe", "ü".encode(), b"\x00", b"*")
_BODIES = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"1",
    b'"text"',
    b"\xff\xfe\x00",
    bytes(range(256)),
    b'{"inputs":["a"]',
    b'{"inputs":["a"]}}',
    b'{"inputs":"a"}',
    b'{"inputs":{}}',
    b'{"inputs":[]}',
    b'{"inputs":["a","b"]}',
    b'{"inputs":[NaN]}',
    b'{"inputs":[Infinity]}',
    b'{"inputs":[1e999999]}',
    b'{"inputs":[' + b"9" * 5000 + b"]}",
    b'{"inputs":[null]}',
    b'{"inputs":[true]}',
    b'{"inputs":[{"a":["b"]}]}',
    b'{"inputs":["\\ud800"]}',
    b'{"inputs":["\\udc00\\ud800"]}',
    b'{"inputs":["\xed\xa0\x80"]}',
    b'{"inputs":["\\u0000\\u001f\\uffff"]}',
    b'{"inputs":["' + b"a " * 50_000 + b'"]}',
    b'{"inputs":["' + b"x" * 100_000 + b'"]}',
    b"[" * 100_000,
    b'{"inputs":[' + b"[" * 900 + b"]" * 900 + b"]}",
    b'{"inputs":["a"],"options":' + b"[" * 50_000 + b"}",
    b'{"inputs":["a"],"options":{"x":' + b'{"x":' * 800 + b"1" + b"}" * 801 + b"}",
    b'{"inputs":["a"],"options":[]}',
    b'{"inputs":["a"],"options":"truncate"}',
    b'{"inputs":["a"],"options":null}',
    b'{"inputs":["a"],"options":{"truncate":5}}',
    b'{"inputs":["a"],"options":{"truncate":["end"]}}',
    b'{"inputs":["a"],"options":{"truncate":{"end":1}}}',
    b'{"inputs":["a"],"options":{"truncate":NaN,"":null}}',
    b'{"inputs":["a"],"inputs":["b","c"]}',
    b'{"inputs":[' + b'"a",' * 5000 + b'"a"]}',
)


def entry(op: str, /, **values: bytes) -> Flat:
    """A good entry but for `values`."""
    good = {
        "v": b"1",
        "id": secrets.token_hex(16).encode(),
        "at": b"1",
        "op": op.encode(),
        "rows": b"1",
        "tokens": b"1",
        "deadline": b"0",
        "queue_by": b"0",
        "client": CLIENT,
        "tenant": b"",
        "trace": b"",
        "call": b"",
        "body": b'{"inputs":["a"]}',
    }
    return [part for name in FIELDS for part in (name.encode(), (good | values)[name])]


def small(op: str) -> Iterator[Flat]:
    """Some hundred different ones, each of at most about 200 kB."""
    good = entry(op)
    for at, name in enumerate(FIELDS):
        yield good[: 2 * at] + good[2 * at + 2 :]
        yield entry(op, **{name: b""})
        yield [*entry(op), name.encode(), b"twice"]
        yield [name.encode(), b"first", *entry(op)]
    for name in ("at", "rows", "tokens", "deadline", "queue_by"):
        yield from (entry(op, **{name: value}) for value in _NUMBERS)
    for name in ("client", "tenant", "op"):
        yield from (entry(op, **{name: value}) for value in _NAMES)
    yield from (entry(op, id=value) for value in _IDS)
    yield from (entry(op, v=value) for value in (b"0", b"2", b"1.0", b"one"))
    yield from (entry(op, trace=value) for value in (b"a\nb", b"a" * 129, b"\xff"))
    yield from (entry(op, body=value) for value in _BODIES)
    # Of detached calls that nobody made.
    yield from (entry(op, client=b"", call=value, body=body) for value in (*_IDS, b"0" * 32) for body in _BODIES[:3])
    # For nobody, and under a key of its own.
    yield from (entry(op, client=b"", body=value) for value in _BODIES)
    yield from (entry(op, rows=value) for value in (b"0", b"2", b"4096", b"4097", b"1000000000"))
    yield from (entry(op, op=value) for value in (b"generate", b"__class__", b"embed.echo"))
    yield from (entry(op, **{name: b"1"}) for name in ("deadline", "queue_by"))
    yield from (entry(op, **{name: str(2**53 + more).encode()}) for name in ("deadline", "queue_by") for more in (0, 1))
    yield [b"hello", b"world"]
    yield [b"", b""]
    yield [*entry(op)[2:], *entry(op)[:2]]
    for number in (1, 52, 64, 500):
        yield entry(op) + [part for each in range(number) for part in (b"field-%d" % each, b"x" * 100)]


def huge(op: str) -> list[Flat]:
    """Three of more than 16 MB."""
    text = b"x" * HUGE
    return [
        entry(op, body=b'{"inputs":["' + text + b'"]}'),
        entry(op, client=text),
        [*entry(op), text, b"a huge name"],
    ]


def forged(op: str, fields: dict[bytes, bytes]) -> list[Flat]:
    """Entries under the id of the live job of these `fields`, to answer its caller, or in its place."""
    body = b'{"inputs":["forged"]}'
    return [entry(op, id=fields[b"id"], client=client, body=body) for client in (fields[b"client"], CLIENT, b"")]
