"""Announcements of detached calls to webhooks: what is sent, how it is signed, when it is tried again. Pure.

The signature is made as Stripe makes its own (https://docs.stripe.com/webhooks#verify-manually): HMAC with SHA-256 over
the time, a dot and the body, in a header `t=TIME,v1=HEX`, which has one `v1` for each secret.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from millstream.broker.contract.errors import Malformed
from millstream.broker.contract.webhook_urls import WebhookUrl, read_webhook_url

ID_HEADER = "X-Millstream-Id"
TIMESTAMP_HEADER = "X-Millstream-Timestamp"
SIGNATURE_HEADER = "X-Millstream-Signature"

ATTEMPT_S = 10.0
"""Seconds that one attempt may take, beside the time to connect, which is at most CONNECT_S for each address."""

CONNECT_S = 3.0
"""Seconds in which one address of the receiver must accept the connection."""

FIRST_RETRY_S, LONGEST_RETRY_S = 20.0, 3_600.0
"""Seconds until the second attempt, more than one attempt takes; longest time between two attempts."""

GIVEN_UP_S = 86_400.0
"""Seconds after the end of a call from which on a failed attempt is the last one."""

MOST_ATTEMPTS, MOST_PER_ORIGIN = 16, 4
"""Attempts of one process at the same time, in all and for one scheme, host and port."""

State = Literal["done", "partly_failed", "failed"]

_ENTRY = re.compile(r"(?P<ms>\d{1,16})-\d{1,16}")
_CALL = re.compile(r"[0-9a-f]{32}")
_PAYLOAD = re.compile(r"(?P<shape>(?P<rows>\d{1,9})x\d{1,9}) [0-9a-f]* (?P<url>\S+)")


@dataclass(frozen=True, slots=True)
class Announcement:
    """End of one call, as it is to be announced to `url`. `entry` is its id in the stream; `rows` of them `failed`.

    `finished_ms` is when the last job was answered, ms of the server's clock. `attempt` counts from 1.
    """

    entry: str
    service: str
    call: str
    shape: str
    url: str
    receiver: WebhookUrl
    rows: int
    failed: int
    finished_ms: int
    attempt: int = 1

    @classmethod
    def of(cls, service: str, entry: str, fields: Mapping[bytes, bytes], attempt: int = 1) -> Announcement:
        """Reads an entry of the stream. Raises Malformed if a script did not write it."""
        call, payload, failed = (
            fields.get(name, b"").decode(errors="replace") for name in (b"call", b"payload", b"failed")
        )
        place, match = _ENTRY.fullmatch(entry), _PAYLOAD.fullmatch(payload)
        if not (place and match and _CALL.fullmatch(call) and re.fullmatch(r"\d{1,9}", failed)):
            raise Malformed("not an announcement of a call")
        try:
            receiver = read_webhook_url(match["url"])
        except ValueError as error:
            raise Malformed(f"its URL {error}") from None
        numbers = int(match["rows"]), int(failed), int(place["ms"])
        return cls(entry, service, call, match["shape"], match["url"], receiver, *numbers, attempt)

    @property
    def id(self) -> str:
        """Name of the announcement: the same in each attempt, another one if the call is submitted and ends again."""
        return f"{self.call}-{self.entry}"

    @property
    def state(self) -> State:
        if not self.failed:
            return "done"
        return "failed" if self.failed >= self.rows else "partly_failed"

    def body(self) -> bytes:
        """Returns the body of the request, equal in each attempt."""
        finished = datetime.fromtimestamp(self.finished_ms / 1000, UTC).isoformat(timespec="milliseconds")
        outcome = Outcome(
            id=f"{self.service}:{self.shape}:{self.call}",
            service=self.service,
            state=self.state,
            rows=self.rows,
            failed=self.failed,
            finished_at=finished.replace("+00:00", "Z"),
        )
        return json.dumps(asdict(outcome)).encode()

    def headers(self, body: bytes, secrets: Sequence[str], now_s: int) -> dict[str, str]:
        """Returns the headers of a request that is sent at `now_s`, Unix seconds."""
        return {
            "Content-Type": "application/json",
            "User-Agent": "millstream",
            ID_HEADER: self.id,
            TIMESTAMP_HEADER: str(now_s),
            SIGNATURE_HEADER: ",".join([f"t={now_s}", *(f"v1={sign(each, now_s, body)}" for each in secrets)]),
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a detached call ended. `id` is for `client.job(id)`, which has the results; `failed` of its `rows` failed.

    `state` is done (no row failed), partly_failed, or failed (all rows did); cancelled rows count as failed.
    `finished_at` is an ISO 8601 time in UTC.
    """

    id: str
    service: str
    state: State
    rows: int
    failed: int
    finished_at: str


def find_receiver(payload: str) -> WebhookUrl | None:
    """Returns the receiver that the payload of a detached call names; None if it names none."""
    match = _PAYLOAD.fullmatch(payload)
    try:
        return read_webhook_url(match["url"]) if match else None
    except ValueError:
        return None


def sign(secret: str, time_s: int, body: bytes) -> str:
    """Returns the signature of `body` at `time_s`, 64 hexadecimal digits."""
    return hmac.new(secret.encode(), f"{time_s}.".encode() + body, hashlib.sha256).hexdigest()


def find_fault(signature: str, body: bytes, secret: str, now_s: float, tolerance_s: float) -> str:
    """Returns the reason not to accept a body with this signature header at `now_s`, "" if there is none."""
    pairs = [part.strip().partition("=") for part in signature.split(",")]
    times = [value for name, _, value in pairs if name == "t"]
    if len(times) != 1 or not re.fullmatch("[0-9]{1,12}", times[0]):
        return f"{SIGNATURE_HEADER} is missing or has no time"
    expected = sign(secret, int(times[0]), body).encode()
    # Compared in constant time, and all of them: the time that it takes must not tell how much of a guess is right.
    equal = [hmac.compare_digest(expected, value.encode()) for name, _, value in pairs if name == "v1"]
    if not any(equal):
        return "the signature is not one of this body by this secret"
    if abs(now_s - int(times[0])) > tolerance_s:
        return f"it was signed more than {tolerance_s:g} s from now"
    return ""


def retry_after_s(attempts: int, first_s: float = FIRST_RETRY_S) -> float:
    """Returns the seconds from the begin of the last of `attempts` to the next one: doubled with each attempt."""
    return float(min(LONGEST_RETRY_S, first_s * 2 ** min(attempts - 1, 32)))


def choose(
    waiting: Iterable[Announcement], running: Collection[Announcement], most: int = MOST_ATTEMPTS
) -> list[Announcement]:
    """Returns those of `waiting` to send now, in order, beside those that are `running`.

    One receiver gets at most MOST_PER_ORIGIN at once, so that one that hangs leaves room for the others.
    """
    busy: dict[str, int] = {}
    for each in running:
        busy[each.receiver.origin] = busy.get(each.receiver.origin, 0) + 1
    chosen: list[Announcement] = []
    for each in waiting:
        if len(running) + len(chosen) >= most:
            break
        origin = each.receiver.origin
        if busy.get(origin, 0) < MOST_PER_ORIGIN:
            busy[origin] = busy.get(origin, 0) + 1
            chosen.append(each)
    return chosen
