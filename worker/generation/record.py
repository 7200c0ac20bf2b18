"""A generated token, and its bytes in the records from which another run of the job goes on.

A state is a sequence of entries, one for each token: a header byte (version in the upper four bits, HAS_LOGPROB in the
lower), the token id as a varint, and if HAS_LOGPROB is set the log probability as a float32, the number of
alternatives as a byte, and for each of them its id as a varint and its log probability as a float32. States can be
joined.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from millstream.broker.contract.errors import Malformed

_VERSION = 1 << 4
_HAS_LOGPROB = 1
_FLOAT = struct.Struct("<f")


class Token(NamedTuple):
    """A generated token. `logprob`: its natural log probability; None if the call asked for none.

    `top`: ids and log probabilities of the most probable tokens in its place, the most probable first. All log
    probabilities are float32 values.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def encode_token(token: Token) -> bytes:
    """Returns the entry of one token."""
    if token.logprob is None:
        return _encode_id(token.id)
    entry = bytearray([_VERSION | _HAS_LOGPROB]) + _varint(token.id) + _FLOAT.pack(token.logprob)
    entry.append(len(token.top))
    for other, logprob in token.top:
        entry += _varint(other) + _FLOAT.pack(logprob)
    return bytes(entry)


@lru_cache(8_192)
def _encode_id(token: int) -> bytes:
    return bytes([_VERSION]) + _varint(token)


def decode_tokens(state: bytes) -> Iterator[Token]:
    """Yields the tokens of a state. Raises Malformed if it is cut off or of another version."""
    at = 0
    try:
        while at < len(state):
            header = state[at]
            if header & ~_HAS_LOGPROB != _VERSION:
                raise Malformed(f"an entry of a token with the header {header:#04x}")
            number, at = _read_varint(state, at + 1)
            if not header & _HAS_LOGPROB:
                yield Token(number)
                continue
            logprob, at = _read_float(state, at)
            count, at = state[at], at + 1
            top = []
            for _ in range(count):
                other, at = _read_varint(state, at)
                value, at = _read_float(state, at)
                top.append((other, value))
            yield Token(number, logprob, tuple(top))
    except (IndexError, struct.error) as error:
        raise Malformed("an entry of a token is cut off") from error


def _varint(number: int) -> bytes:
    """Returns seven bits a byte, the lowest first; the highest bit says that another byte follows."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)


def _read_varint(blob: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while blob[at] & 0x80:
        number |= (blob[at] & 0x7F) << shift
        shift += 7
        at += 1
    return number | blob[at] << shift, at + 1


def _read_float(blob: bytes, at: int) -> tuple[float, int]:
    return _FLOAT.unpack_from(blob, at)[0], at + _FLOAT.size
