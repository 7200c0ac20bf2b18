"""One process's traffic with one server: a sender thread for all calls, a reader thread for each service."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence

from millstream.broker.contract.errors import BrokerUnavailable, MillstreamError
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.replies import Replies
from millstream.broker.queue.submission import Submission
from millstream.broker.transport.connection import Connection
from millstream.client.channel.reader import READ_S, Reader
from millstream.client.channel.requests import NO_THREAD, Cancellation, client_closed
from millstream.client.channel.sender import Sender


class Channel:
    """Shared by all clients of a process that talk to one server; thread-safe. Threads start with the first call."""

    def __init__(self, connection: Connection, registry: Registry) -> None:
        self._connection = connection
        self._registry = registry
        self._closed = False
        self.after_fork()

    def after_fork(self) -> None:
        """In a forked child: an identity, locks and threads of its own; its parent's calls are not its calls."""
        self.client_id = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._readers: dict[str, Reader] = {}
        self._sender: Sender | None = None

    def submit(self, submissions: Sequence[Submission]) -> None:
        """Send these, answers and refusals to their sinks. Returns at once. Raises BrokerUnavailable once closed."""
        for submission in submissions:
            reader = self._readers.get(submission.service) or self._open_reader(submission.service)
            reader.expect(submission)
        try:
            (self._sender or self._open_sender()).put(submissions)
        except MillstreamError:
            for submission in submissions:
                self.forget(submission.service, submission.job_ids)
            raise

    def submit_detached(self, submissions: Sequence[Submission]) -> None:
        """Send detached jobs, whose answers nobody here waits for. Returns at once. Raises BrokerUnavailable."""
        (self._sender or self._open_sender()).put(submissions)

    def refusal_of(self, job_id: str) -> MillstreamError | None:
        """Why a job was not accepted yet and waits to be sent again; None if it does not."""
        return self._sender.refusal_of(job_id) if self._sender else None

    def flush(self, timeout: float) -> None:
        """Wait until the server has heard of every cancellation, for at most `timeout` seconds."""
        if self._sender:
            self._sender.flush(timeout)

    def cancel(self, cancellation: Cancellation) -> None:
        """Stop jobs; in order with what was submitted before, so that none slips in behind. Returns at once."""
        self.forget(cancellation.service, cancellation.job_ids)
        self.cancel_detached(cancellation)

    def cancel_detached(self, cancellation: Cancellation) -> None:
        """The same for detached jobs."""
        (self._sender or self._open_sender()).put([cancellation])

    def forget(self, service: str, job_ids: Sequence[str]) -> None:
        """Nobody waits for these jobs any more; late answers are dropped."""
        if reader := self._readers.get(service):
            reader.forget(job_ids)

    @property
    def stray_replies(self) -> int:
        """Replies so far that nobody waited for."""
        with self._lock:
            return sum(reader.strays for reader in self._readers.values())

    def close(self) -> None:
        """End the threads; jobs under way go on without anybody waiting."""
        with self._lock:
            self._closed = True
            if self._sender:
                self._sender.close()
            readers = list(self._readers.values())
        for reader in readers:
            reader.close()
        self._connection.close()

    def _awaited(self) -> int:
        """Jobs whose answers have not been read."""
        return sum([reader.awaited for reader in list(self._readers.values())])

    def _open_sender(self) -> Sender:
        with self._lock:
            self._check_open()
            if self._sender is None:
                sender = Sender(self._connection, self._registry, self.client_id, self.forget, self._awaited)
                start(sender)
                self._sender = sender
            return self._sender

    def _open_reader(self, service: str) -> Reader:
        with self._lock:
            self._check_open()
            reader = self._readers.get(service)
            if reader is None:
                client = self._connection.blocking(READ_S)
                replies = Replies(client, self._registry.keys(service), self.client_id)
                reader = Reader(service, replies)
                start(reader)
                self._readers[service] = reader
            return reader

    def _check_open(self) -> None:
        if self._closed:
            raise client_closed()


def start(thread: threading.Thread) -> None:
    """Start it. Raises BrokerUnavailable if the system has no thread left; the next call tries again."""
    try:
        thread.start()
    except RuntimeError as error:
        raise BrokerUnavailable(
            f"the client cannot start its thread {thread.name!r}: {error}", hint=NO_THREAD
        ) from error
