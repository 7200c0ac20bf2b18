"""Commands are packed as the library packs them, whatever they hold."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from redis.connection import HiredisRespSerializer

from millstream.broker.transport.connection import Connection
from millstream.broker.transport.link import FastPacker

names = st.sampled_from(["EVALSHA", "CONFIG GET", b"XREADGROUP", b"XINFO GROUPS"])
words = st.text(st.characters(exclude_categories=["Cs"])) | st.binary() | st.integers() | st.floats()
library: Any = HiredisRespSerializer()


@given(names, st.lists(words | st.binary().map(bytearray) | st.binary().map(lambda word: memoryview(word)), max_size=8))
def test_the_bytes_are_those_of_the_library(name: str | bytes, arguments: list[object]) -> None:
    assert b"".join(FastPacker().pack(name, *arguments)) == b"".join(library.pack(name, *arguments))


@pytest.mark.parametrize("argument", [None, [1], object()])
def test_what_cannot_be_sent_is_refused_as_the_library_does(argument: object) -> None:
    with pytest.raises(redis.DataError):
        FastPacker().pack("SET", "key", argument)


@pytest.mark.parametrize(
    "url", ["redis://nowhere", "unix:///nowhere", "redis+sentinel://nowhere:1/master", "rediss://nowhere"]
)
def test_every_connection_packs_so(url: str) -> None:
    connection: Any = Connection(url).own().connection_pool.make_connection()

    assert isinstance(connection._command_packer, FastPacker)
