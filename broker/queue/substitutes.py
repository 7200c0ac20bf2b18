"""Replies that the queue writes itself, in place of a worker's: to cancelled, purged, unread and too large ones."""

from __future__ import annotations

from millstream.broker.contract.codec import encode_reply
from millstream.broker.contract.errors import Cancelled, ReaderTooSlow, ReplyTooLarge
from millstream.broker.contract.job import Reply

UNREAD_BYTES = 128 * 1024 * 1024
"""Most unread bytes of a client's reply stream. Beyond it the client is slow or dead, and gets small errors instead."""

MAX_REPLY_BYTES = 60 * 1024 * 1024
"""Most bytes of a reply. A larger one is replaced by an error, because a server with `proto-max-bulk-len 64mb` would
cut the worker's connection."""

CANCELLED = encode_reply(Reply(error=Cancelled("cancelled by its caller before it ran")))
UNREAD = encode_reply(
    Reply(
        error=ReaderTooSlow(
            f"the reply was dropped: this client has {UNREAD_BYTES >> 20} MiB of unread replies",
            hint="do not block its process or its event loop, or make fewer and smaller calls at a time",
        )
    )
)
TOO_LARGE = encode_reply(
    Reply(
        error=ReplyTooLarge(
            f"the reply has more than {MAX_REPLY_BYTES >> 20} MiB",
            hint="lower batch_size, or ask for fewer rows, fewer dimensions or encoding=float16",
        )
    )
)
PURGED = encode_reply(Reply(error=Cancelled("purged from the queue before it ran", hint="an operator did it")))
