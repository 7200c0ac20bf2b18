"""Texts that grow outlive their workers: a successor begins right behind the last word that was emitted."""

from __future__ import annotations

from typing import Any, cast

from e2e.conftest import Supervised
from e2e.sites import Site, echo_stream
from support import eventually

from millstream.broker.contract.partial import decode_records, text_of
from millstream.broker.queue.lease import Lease
from millstream.broker.queue.streams import Streams
from millstream.client import Client
from millstream.worker.models.echo_stream import BEGAN

STREAMS, WORDS = 20, 200


def is_connected(site: Site) -> bool:
    """Whether a worker of the service has a connection: the server may still read what a dead one sent."""
    name = f"millstream-worker-{site.spec.name}"
    return any(each["name"] == name for each in site.connection.client.client_list())


def test_a_successor_begins_behind_the_last_word_that_was_emitted(supervised: Supervised) -> None:
    site = supervised(echo_stream("sleep:0.01", batch_size=32), 1)
    streams = Streams(site.connection.client, site.keys)
    texts = [" ".join(f"{number}.{word}" for word in range(WORDS)) for number in range(STREAMS)]
    with Client(site.url) as client:
        handles = [client.submit(site.spec.name, [text]) for text in texts]
        ids = [handle.id for handle in handles]
        eventually(lambda: all(len(decode_records(each)) > 10 for each in streams.partials(ids)))
        (consumer,) = site.watch.live()
        site.hosts[0].lose()
        eventually(lambda: not is_connected(site))
        # Nobody runs: this is what a successor finds.
        emitted = [decode_records(each) for each in streams.partials(ids)]
        Lease(site.connection.client, site.keys).release(consumer, gone=True)

        site.start_host(1)
        values = cast(list[dict[str, Any]], [handle.result(60)[0] for handle in handles])

    assert [value["text"] for value in values] == texts
    assert [value["began"] for value in values] == [[0, len(records)] for records in emitted]
    assert all(text.startswith(text_of(records)) for text, records in zip(texts, emitted, strict=True))
    assert [sum(record.state == BEGAN for record in records) for records in emitted] == [1] * STREAMS
    assert not site.connection.client.keys(site.keys.partial("*"))
