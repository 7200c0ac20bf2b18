"""For receivers of webhooks: verifies that a request was sent by millstream, and reads its body."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.webhooks import ID_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER, Outcome, find_fault

__all__ = ["ID_HEADER", "SIGNATURE_HEADER", "TIMESTAMP_HEADER", "Outcome", "verify"]


def verify(headers: Mapping[str, str], body: bytes, secret: str, tolerance_s: float = 300.0) -> Outcome:
    """Returns the outcome that a request announces, if `secret` signed it at most `tolerance_s` seconds from now.

    `body` is the body as it came, byte for byte. An announcement may come twice: its header X-Millstream-Id is equal.
    Raises InvalidRequest if the request is not to be trusted.
    """
    signature = next((value for name, value in headers.items() if name.lower() == SIGNATURE_HEADER.lower()), "")
    if fault := find_fault(signature, body, secret, time.time(), tolerance_s):
        raise InvalidRequest(f"not an announcement to trust: {fault}", hint="answer with status 400")
    record = json.loads(body)
    # A newer sender may add fields.
    return Outcome(**{name: record[name] for name in Outcome.__dataclass_fields__})
