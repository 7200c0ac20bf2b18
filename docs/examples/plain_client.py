"""Sends texts to a millstream service as one job and prints one JSON line per text, in order.

Usage: python plain_client.py URL SERVICE OPERATION ENQUEUE_LUA TEXT...
URL is redis://[user:password@]host:port/db or unix:///path. A line is a vector, a value, or {"error": {...}}.
If the whole job fails, one line on standard error says why, and the exit code is 1. If a connection breaks, the client
connects again until the deadline; the job keeps its id, so it is accepted once. docs/protocol.md has the format.
"""

import contextlib
import hashlib
import json
import secrets
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TIMEOUT_S, GRACE_S = 60, 5  # The answer may come GRACE_S after the deadline.
SILENCE_S, BLOCK_MS = 10, 2000  # A connection that is silent for SILENCE_S is broken. BLOCK 0 would wait for ever.
KEYS = ("service", "q:realtime", "q:normal", "q:batch", "bucket", "paused", "refused", "metrics", "bucket")
NUMBERS = {"float32": "f", "float16": "e", "uint8": "B"}


class Failure(Exception):
    """The job as a whole has no result."""


class Connection:
    """A RESP2 connection. Raises OSError if it breaks or the server is loading, Failure for other errors."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(SILENCE_S)
            self._socket.connect(parts.path)
        else:
            self._socket = socket.create_connection((parts.hostname, parts.port or 6379), SILENCE_S)
        self._input = self._socket.makefile("rb")
        if parts.password:
            self.call("AUTH", unquote(parts.username or "default"), unquote(parts.password))
        if parts.scheme != "unix":
            self.call("SELECT", parts.path.strip("/") or 0)

    def call(self, *words: object) -> Any:
        encoded = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        bulks = [b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded]
        self._socket.sendall(b"*%d\r\n%b" % (len(bulks), b"".join(bulks)))
        return self._read()

    def _read(self) -> Any:
        line = self._input.readline()
        kind, text = line[:1], line[1:-2]
        if not line.endswith(b"\n") or line.startswith(b"-LOADING"):
            raise ConnectionError(text.decode() or "the server closed the connection")
        if kind == b"-":
            raise Failure(text.decode())
        if kind == b"+":
            return text
        number = int(text)
        if kind == b":" or number < 0:
            return number if kind == b":" else None
        if kind == b"*":
            return [self._read() for _ in range(number)]
        data = self._input.read(number + 2)
        if len(data) < number + 2:
            raise ConnectionError("the server closed the connection")
        return data[:-2]


class Job:
    """One job that has all texts as rows. It keeps its id and its client's id, so it can be sent again."""

    def __init__(self, service: str, operation: str, script: bytes, texts: list[str]) -> None:
        job_id, client, self._script = secrets.token_hex(16), secrets.token_hex(16), script
        self._keys = [f"ms:{{{service}}}:{name}" for name in (*KEYS, f"seen:{job_id}")]
        self._replies = f"ms:{{{service}}}:reply:{client}"
        tokens = sum(1 + len(text.encode()) // 4 for text in texts)  # an estimate
        self._head = [1, 2, 1, 1, 1, "", job_id, operation, len(texts), tokens]  # 2 is the priority `normal`.
        self._tail = ["", client, "", "", json.dumps({"inputs": texts, "options": {}})]

    def run(self, url: str) -> bytes:
        """Sends the job and returns its encoded reply. If the first connection fails, it raises OSError at once."""
        deadline = time.monotonic() + TIMEOUT_S
        connection: Connection | None = Connection(url)
        accepted, problem = False, "no answer came in time"
        while (left_s := deadline - time.monotonic()) > (-GRACE_S if accepted else 0):
            try:
                connection = connection or Connection(url)
                # Reads before it sends again: if the job was answered meanwhile, its key `seen` may have expired.
                if (reply := self._receive(connection, BLOCK_MS if accepted else 1)) is not None:
                    return reply
                if not accepted:
                    state, *refusal = self._send(connection, int(left_s * 1000) + 1)
                    accepted, problem = state != 0, "no answer came in time"
                    if not accepted:
                        problem = f"{refusal[0].decode()}: the service refused the job"
                        if refusal[0] not in (b"paused", b"queue_full", b"rate_limited"):
                            break
                        time.sleep(min(refusal[1] / 1000, left_s))
            except OSError:
                if left_s <= 0:
                    raise
                connection = None
                time.sleep(0.2)
        raise Failure(problem)

    def _send(self, connection: Connection, deadline_in_ms: int) -> list[Any]:
        """Returns [1] or [2] if the job is accepted, otherwise [0, reason, ms to wait, limit]."""
        words = [len(self._keys), *self._keys, *self._head, deadline_in_ms, *self._tail]
        outcomes: list[list[Any]]
        try:
            outcomes = connection.call("EVALSHA", hashlib.sha1(self._script).hexdigest(), *words)
        except Failure as error:
            if not str(error).startswith("NOSCRIPT"):
                raise
            outcomes = connection.call("EVAL", self._script, *words)
        return outcomes[0]

    def _receive(self, connection: Connection, block_ms: int) -> bytes | None:
        found = connection.call("XREAD", "BLOCK", block_ms, "STREAMS", self._replies, 0)
        entries = found[0][1] if found else []
        if entries:
            with contextlib.suppress(OSError):  # The entries were read, and the stream expires by itself.
                connection.call("XDEL", self._replies, *(entry for entry, _ in entries))
        fields = [dict(zip(words[::2], words[1::2], strict=True)) for _, words in entries]
        return next((entry[b"reply"] for entry in fields if b"reply" in entry), None)  # not a `delta`


def results_of(reply: bytes, rows: int) -> list[Any]:
    """Returns a vector, a value or {"error": ...} for each row. Raises Failure if all rows have one error."""
    line, _, numbers = reply.partition(b"\n")
    head = json.loads(line)
    if head["v"] != 1:
        raise Failure("model_failed: this version of the reply is unknown: update the client")
    if error := head.get("error"):
        raise Failure(f"{error['code']}: {error['message']} {error.get('hint') or ''}")
    count, dimension = head.get("shape", (0, 0))
    flat = struct.unpack(f"<{count * dimension}{NUMBERS[head.get('dtype', 'float32')]}", numbers)
    vectors = [list(flat[row * dimension : (row + 1) * dimension]) for row in range(count)]
    results = {int(row): {"error": error} for row, error in head.get("errors", {}).items()}
    good, answers = [row for row in range(rows) if row not in results], head.get("values", vectors)
    if len(answers) != len(good):
        raise Failure(f"model_failed: the reply has {len(answers)} results for {len(good)} rows")
    results.update(zip(good, answers, strict=True))
    return [results[row] for row in range(rows)]


def main() -> None:
    if len(sys.argv) < 6:
        sys.exit("usage: plain_client.py URL SERVICE OPERATION ENQUEUE_LUA TEXT...")
    url, service, operation, script, *texts = sys.argv[1:]
    try:
        reply = Job(service, operation, Path(script).read_bytes(), texts).run(url)
        for result in results_of(reply, len(texts)):
            sys.stdout.write(json.dumps(result) + "\n")
    except (Failure, OSError, ValueError, LookupError, TypeError, struct.error) as error:
        sys.exit(" ".join(f"{error}".split()))


if __name__ == "__main__":
    main()
