"""The text so far of a running job is read in parts, each behind the one before."""

from __future__ import annotations

import pytest

from millstream.broker.contract.errors import Malformed
from millstream.broker.contract.partial import Delta, Record, encode_record
from millstream.client.partial_text import PartialText


class Server:
    """Records of one job. `sizes` are the bytes that each read was to pass over."""

    def __init__(self) -> None:
        self.records = b""
        self.sizes: list[int] = []

    def add(self, *texts: str) -> None:
        self.records += b"".join(encode_record(Record(text, b"state")) for text in texts)

    def partial_behind(self, job_id: str, size: int) -> bytes:
        assert job_id == "job"
        self.sizes.append(size)
        return self.records[size:]


def test_each_read_gives_what_was_added_since_the_last_one_with_its_place() -> None:
    server, so_far = Server(), PartialText("job")
    empty = so_far.read(server)
    server.add("mïll ", "🌊 ")
    first, size = so_far.read(server), len(server.records)
    again = so_far.read(server)
    server.add("", "turns")

    assert [empty, first, again, so_far.read(server)] == [
        Delta(0, ""),
        Delta(0, "mïll 🌊 "),
        Delta(7, ""),
        Delta(7, "turns"),
    ]
    assert server.sizes == [0, 0, size, size]


def test_after_records_that_cannot_be_read_the_text_is_read_from_its_beginning() -> None:
    server, so_far = Server(), PartialText("job")
    server.add("mill")
    so_far.read(server)
    server.records += b"cut off"

    with pytest.raises(Malformed):
        so_far.read(server)
    server.records = b""
    server.add("other")
    assert so_far.read(server) == Delta(0, "other")
