"""Channel of one process to one server: a sender thread for all calls, a reader thread for each service."""

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
    """Channel for all calls of one client. Thread-safe. Its threads start with the first call."""

    def __init__(self, connection: Connection, registry: Registry) -> None:
        self._connection = connection
        self._registry = registry
        self._closed = False
        self.after_fork()

    def after_fork(self) -> None:
        """Gives a forked child its own client id, locks and threads. It does not inherit its parent's calls."""
        self.client_id = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._readers: dict[str, Reader] = {}
        self._sender: Sender | None = None

    def submit(self, submissions: Sequence[Submission]) -> None:
        """Sends `submissions` and returns at once. Their sinks get the answers and refusals.

        Raises BrokerUnavailable if the channel is closed.
        """
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
        """Sends detached jobs and returns at once. No reader waits for their answers, which stay on the server.

        Raises BrokerUnavailable if the channel is closed.
        """
        (self._sender or self._open_sender()).put(submissions)

    def refusal_of(self, job_id: str) -> MillstreamError | None:
        """Returns why a job was not accepted yet and waits to be sent again; None if it does not wait."""
        return self._sender.refusal_of(job_id) if self._sender else None

    def flush(self, timeout: float) -> None:
        """Waits until every cancellation has been sent to the server, for at most `timeout` seconds."""
        if self._sender:
            self._sender.flush(timeout)

    def cancel(self, cancellation: Cancellation) -> None:
        """Cancels jobs and returns at once.

        A cancellation keeps its place behind earlier submissions, so it cannot reach the server before its jobs.
        """
        self.forget(cancellation.service, cancellation.job_ids)
        self.cancel_detached(cancellation)

    def cancel_detached(self, cancellation: Cancellation) -> None:
        """Cancels detached jobs and returns at once, in the same order as `cancel`."""
        (self._sender or self._open_sender()).put([cancellation])

    def forget(self, service: str, job_ids: Sequence[str]) -> None:
        """Stops waiting for these jobs; their late answers are dropped."""
        if reader := self._readers.get(service):
            reader.forget(job_ids)

    @property
    def stray_replies(self) -> int:
        """Number of replies so far that no call waited for."""
        with self._lock:
            return sum(reader.strays for reader in self._readers.values())

    def close(self) -> None:
        """Ends the threads. Jobs in flight still run, but no caller gets their answers."""
        with self._lock:
            self._closed = True
            if self._sender:
                self._sender.close()
            readers = list(self._readers.values())
        for reader in readers:
            reader.close()
        self._connection.close()

    def _count_awaited(self) -> int:
        """Returns the number of jobs whose answers have not been read."""
        return sum([reader.awaited for reader in list(self._readers.values())])

    def _open_sender(self) -> Sender:
        with self._lock:
            self._check_open()
            if self._sender is None:
                sender = Sender(self._connection, self._registry, self.client_id, self.forget, self._count_awaited)
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
    """Starts `thread`. Raises BrokerUnavailable if the system has no thread left; the next call tries again."""
    try:
        thread.start()
    except RuntimeError as error:
        raise BrokerUnavailable(
            f"the client cannot start its thread {thread.name!r}: {error}", hint=NO_THREAD
        ) from error
