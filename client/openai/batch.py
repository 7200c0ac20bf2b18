"""Lines of OpenAI's batch files: requests in, answers and errors out. Pure."""

from __future__ import annotations

from typing import NamedTuple, cast

from millstream.broker.contract.errors import InvalidRequest, MillstreamError
from millstream.broker.contract.job import Json
from millstream.client.openai.failures import body_of, status_of
from millstream.client.openai.requests import OpenAICall, read_request

_FIELDS = frozenset({"custom_id", "method", "url", "body"})


class BatchRequest(NamedTuple):
    """Line of a batch's input file. `call` is the error if the request is not valid; `custom_id` None: it has none."""

    custom_id: str | None
    call: OpenAICall | InvalidRequest


def read_line(value: Json) -> BatchRequest:
    """Returns the request of a line, {custom_id, method, url, body}. Never raises: a fault is the line's own error."""
    custom_id = value.get("custom_id") if isinstance(value, dict) else None
    name = custom_id if isinstance(custom_id, str) else None
    try:
        return BatchRequest(name, _read(value))
    except InvalidRequest as error:
        return BatchRequest(name, error)


def _read(value: Json) -> OpenAICall:
    if not isinstance(value, dict):
        raise InvalidRequest("the line is not a JSON object", hint="{custom_id, method, url, body}")
    custom_id, method = value.get("custom_id"), value.get("method")
    if not (isinstance(custom_id, str) and custom_id):
        raise InvalidRequest("custom_id: not a string of at least one character")
    if method != "POST":
        raise InvalidRequest(f"method: {str(method)[:80]!r} is not POST")
    if unknown := sorted(value.keys() - _FIELDS):
        raise InvalidRequest(f"{unknown[0][:80]}: a batch does not support this field", hint=", ".join(sorted(_FIELDS)))
    return read_request(cast(str, value.get("url")), value.get("body"))


def write_line(request_id: str, custom_id: str | None, outcome: dict[str, Json] | MillstreamError) -> dict[str, Json]:
    """Returns the line of a batch's output file or, if the outcome is an error, of its error file.

    `request_id` is unique, without a prefix. `outcome` is the body of the answer or the error.
    """
    line: dict[str, Json] = {"id": f"batch_req_{request_id}", "custom_id": custom_id, "response": None, "error": None}
    if not isinstance(outcome, MillstreamError):
        return {**line, "response": {"status_code": 200, "request_id": f"req_{request_id}", "body": outcome}}
    if custom_id is None:
        # The line is no request, so it got no response.
        return {**line, "error": {"code": outcome.code, "message": str(outcome)}}
    status, body = status_of(outcome), body_of(outcome)
    return {**line, "response": {"status_code": status, "request_id": f"req_{request_id}", "body": body}}
