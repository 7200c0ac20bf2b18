"""Thread of a supervisor's process that announces detached calls to their webhooks."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from millstream.broker.config.webhooks import WebhookSettings, read_secrets
from millstream.broker.contract.errors import ConfigError, described
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.contract.webhook_urls import is_allowed
from millstream.broker.contract.webhooks import Announcement, choose
from millstream.broker.queue.webhooks import Webhooks
from millstream.broker.transport.connection import Connection
from millstream.worker.supervision.webhook_request import post

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Seconds between two looks for announcements to send."""

MOST_HELD = 1_000
"""Announcements of a service that one sender takes before they are sent."""

END_S = 2.0
"""Seconds at most that the end of the process waits for the thread. Attempts that run are made again by others."""


class WebhookSender(threading.Thread):
    """Sends the announcements of `services` until `stop`. Several senders share the work.

    A URL is sent to only if this host's own file allows it: whoever can write to Redis must not choose the receiver.
    """

    def __init__(
        self, connection: Connection, prefix: str, services: Sequence[str], allow: Sequence[str], secret_file: Path
    ) -> None:
        super().__init__(name="webhooks", daemon=True)
        self._webhooks = {name: Webhooks(connection.client, ServiceKeys(name, prefix)) for name in services}
        self._allow = allow
        self._secret_file = secret_file
        self._waiting: dict[tuple[str, str], Announcement] = {}
        self._running: dict[tuple[str, str], Announcement] = {}
        self._ended: queue.SimpleQueue[tuple[Announcement, str] | None] = queue.SimpleQueue()
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True
        self._ended.put(None)

    def run(self) -> None:
        look_at = time.monotonic()
        while not self._stopped:
            if time.monotonic() >= look_at:
                self._look()
                look_at = time.monotonic() + LOOK_S
            self._begin_attempts()
            self._await_end(look_at)

    def _look(self) -> None:
        """Takes what is new or due. If the server is away, the next look tries again."""
        for name, webhooks in self._webhooks.items():
            waiting = [each.entry for each in self._waiting.values() if each.service == name]
            running = [each.entry for each in self._running.values() if each.service == name]
            try:
                webhooks.renew(waiting)
                for each in webhooks.take(MOST_HELD - len(waiting), {*waiting, *running}):
                    self._waiting[name, each.entry] = each
            except Exception as error:  # noqa: BLE001 - one service's broken keys must not affect the others
                log.debug("service %s: its webhooks cannot be read: %s", name, described(error))

    def _begin_attempts(self) -> None:
        for each in choose(self._waiting.values(), self._running.values()):
            key = (each.service, each.entry)
            self._running[key] = self._waiting.pop(key)
            threading.Thread(target=self._attempt, args=(each,), name="webhook", daemon=True).start()

    def _attempt(self, announcement: Announcement) -> None:
        self._ended.put((announcement, self._send(announcement)))

    def _send(self, announcement: Announcement) -> str:
        """Returns why the announcement is not delivered, "" if it is."""
        if not is_allowed(announcement.receiver, self._allow):
            return "the config.yaml of the host that sends does not allow this URL"
        try:
            secrets = read_secrets(self._secret_file)
        except ConfigError as error:
            return str(error)
        body = announcement.body()
        return post(announcement.receiver, announcement.headers(body, secrets, int(time.time())), body)

    def _await_end(self, until: float) -> None:
        try:
            ended = self._ended.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return
        if ended:
            self._note(*ended)

    def _note(self, announcement: Announcement, reason: str) -> None:
        del self._running[announcement.service, announcement.entry]
        if reason:
            self._put_back(announcement.receiver.origin)
        try:
            self._write(announcement, reason)
        except Exception as error:  # noqa: BLE001 - then the announcement is sent again, as its receiver must expect
            log.warning("call %s: the end of its webhook cannot be noted: %s", announcement.call, described(error))

    def _put_back(self, origin: str) -> None:
        """Leaves what waits for a receiver that failed to its next attempt: it would fail for the same reason."""
        self._waiting = {key: each for key, each in self._waiting.items() if each.receiver.origin != origin}

    def _write(self, announcement: Announcement, reason: str) -> None:
        webhooks, origin = self._webhooks[announcement.service], announcement.receiver.origin
        if not reason:
            webhooks.note_delivered(announcement)
            log.debug("call %s: announced to %s", announcement.call, origin)
        elif webhooks.note_failed(announcement, reason):
            log.error("call %s: its webhook at %s is given up: %s", announcement.call, origin, reason)
        else:
            log.warning("call %s: attempt %d at %s: %s", announcement.call, announcement.attempt, origin, reason)


@contextmanager
def sending(url: str, prefix: str, services: Sequence[str], settings: WebhookSettings) -> Iterator[None]:
    """Sends announcements meanwhile, if this host's `settings` allow any receiver.

    Raises ConfigError if the secret cannot be read, BrokerUnavailable.
    """
    if not (settings.allow and settings.secret_file):
        yield
        return
    read_secrets(settings.secret_file)
    connection = Connection(url, name="millstream-webhooks")
    sender = WebhookSender(connection, prefix, services, settings.allow, settings.secret_file)
    sender.start()
    try:
        yield
    finally:
        sender.stop()
        sender.join(END_S)
        connection.close()
