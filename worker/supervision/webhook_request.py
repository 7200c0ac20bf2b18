"""One request to a webhook: bounded in time, no redirect followed, no proxy used, and no body read.

The standard library is enough: a receiver gets one small request, and a connection is not used again.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from collections.abc import Mapping
from contextlib import suppress

from millstream.broker.contract.webhook_urls import WebhookUrl
from millstream.broker.contract.webhooks import ATTEMPT_S, CONNECT_S


def post(receiver: WebhookUrl, headers: Mapping[str, str], body: bytes, limit_s: float = ATTEMPT_S) -> str:
    """Sends the body. Returns why the receiver did not accept it, "" if it did: a status of 200 to 299."""
    connection = _open(receiver)
    # A time limit of the socket is for each read alone: a receiver that sends byte by byte would never reach it.
    late = threading.Event()
    timer = threading.Timer(limit_s, _cut, (connection, late))
    timer.daemon = True
    timer.start()
    try:
        connection.connect()
        if connection.sock:
            connection.sock.settimeout(limit_s)
        connection.request("POST", receiver.target, body, dict(headers))
        status = connection.getresponse().status
    except Exception as error:  # noqa: BLE001 - whatever a receiver sends, its announcement is tried again later
        if late.is_set() or isinstance(error, TimeoutError):
            return f"no answer within {limit_s:g} s"
        return _describe(error)
    finally:
        timer.cancel()
        connection.close()
    if 300 <= status < 400:
        return f"status {status}: redirects are not followed"
    return "" if 200 <= status < 300 else f"status {status}"


def _open(receiver: WebhookUrl) -> http.client.HTTPConnection:
    if receiver.scheme == "https":
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(receiver.host, receiver.port, timeout=CONNECT_S, context=context)
    return http.client.HTTPConnection(receiver.host, receiver.port, timeout=CONNECT_S)


def _cut(connection: http.client.HTTPConnection, late: threading.Event) -> None:
    late.set()
    with suppress(OSError, ValueError):
        if connection.sock:
            connection.sock.shutdown(socket.SHUT_RDWR)


def _describe(error: Exception) -> str:
    """Returns the reason without what the receiver sent, which may be anything."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    reason = error.strerror if isinstance(error, OSError) else ""
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__
