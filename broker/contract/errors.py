"""The errors that callers catch: one hierarchy. The class says whose fault it is and if trying again helps."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

Fault = Literal["caller", "service", "infrastructure"]


class MillstreamError(Exception):
    """Base class of all errors. `code` names the class in replies, `hint` says what to do, `retry_after` is in seconds.

    `retryable`: the same call may succeed later. `exit_code` is that of the command line.
    """

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    fault: ClassVar[Fault] = "service"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def details(self) -> dict[str, str]:
        """Returns the fields that a subclass adds to the wire form, by the names of its constructor's arguments."""
        return {}


class InvalidRequest(MillstreamError):
    """The request is not valid: an input is not a string, an option is unknown, a text is not valid Unicode."""

    code = "invalid_request"
    fault = "caller"
    exit_code = 2


class InputTooLong(InvalidRequest):
    """A text has more tokens than the model reads, and the call did not ask for truncation."""

    code = "input_too_long"


class ConfigError(MillstreamError):
    """config.yaml, an environment variable or a flag is wrong; the message names file, line, key and the fix."""

    code = "config_error"
    fault = "caller"
    exit_code = 3


class UnknownService(MillstreamError):
    """No such service is registered on this server."""

    code = "unknown_service"
    fault = "caller"
    exit_code = 4

    def __init__(
        self, message: str, *, did_you_mean: str = "", hint: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(message, hint=hint, retry_after=retry_after)
        self.did_you_mean = did_you_mean

    def details(self) -> dict[str, str]:
        return {"did_you_mean": self.did_you_mean}


class BrokerUnavailable(MillstreamError):
    """The Redis server cannot be reached, is still loading, or refuses to write."""

    code = "broker_unavailable"
    retryable = True
    fault = "infrastructure"
    exit_code = 5


class NoWorkers(MillstreamError):
    """The job waits, but no worker of its service is alive."""

    code = "no_workers"
    retryable = True
    fault = "infrastructure"
    exit_code = 6


class DeadlineExceeded(MillstreamError):
    """The deadline passed before the job was answered. `phase` names the limit: queue, inference or total."""

    code = "deadline_exceeded"
    retryable = True
    exit_code = 7

    def __init__(self, message: str, *, phase: str = "total", hint: str = "", retry_after: float | None = None) -> None:
        super().__init__(message, hint=hint, retry_after=retry_after)
        self.phase = phase

    def details(self) -> dict[str, str]:
        return {"phase": self.phase}


class QueueFull(MillstreamError):
    """`max_queue_size` is reached, of this priority or of its tenant; none of the call's jobs was accepted."""

    code = "queue_full"
    retryable = True
    exit_code = 8


class RateLimited(MillstreamError):
    """The service's rate limit is used up for now; none of the call's jobs was accepted."""

    code = "rate_limited"
    retryable = True
    exit_code = 8


class ServicePaused(MillstreamError):
    """The service is paused and refuses new jobs; none of the call's jobs was accepted."""

    code = "service_paused"
    retryable = True
    exit_code = 8


class ModelFailed(MillstreamError):
    """The model raised an error or returned an invalid result, for this input alone."""

    code = "model_failed"
    exit_code = 9


class ModelUnavailable(ModelFailed):
    """The model cannot be loaded: its folder or a package is missing, or there is not enough memory."""

    code = "model_unavailable"


class MixedModels(ModelFailed):
    """Different weights answered parts of one call, for example while the weights are being changed."""

    code = "mixed_models"
    retryable = True


class UnsupportedVersion(MillstreamError):
    """The client is newer than the worker, which cannot read the job: update the workers."""

    code = "unsupported_version"
    fault = "infrastructure"
    exit_code = 9


class ReplyTooLarge(MillstreamError):
    """The job ran, but its reply has more bytes than allowed. Running it again would give the same error."""

    code = "reply_too_large"
    fault = "caller"
    exit_code = 9


class ReaderTooSlow(MillstreamError):
    """The job ran, but its reply was dropped, because the client has too many unread replies."""

    code = "reader_too_slow"
    retryable = True
    fault = "caller"
    exit_code = 9


class StreamDiverged(MillstreamError):
    """A job's text is not the continuation of the text that its caller has been given; the call ends.

    It means that two runs of the job generated different texts. The same call again generates another text.
    """

    code = "stream_diverged"
    exit_code = 9


class WorkerLost(MillstreamError):
    """A worker died each time it ran this job, which is now a dead letter."""

    code = "worker_lost"
    exit_code = 9


class Cancelled(MillstreamError):
    """The job was cancelled before it finished."""

    code = "cancelled"
    fault = "caller"


class ResultExpired(MillstreamError):
    """The job was answered, but its result has expired."""

    code = "result_expired"
    fault = "caller"


class PartialFailure(MillstreamError):
    """Some rows of a call failed. `errors` maps their index to an error; `results` has None for these rows."""

    code = "partial_failure"
    exit_code = 9

    def __init__(self, message: str, *, errors: Mapping[int, MillstreamError], results: list[object]) -> None:
        super().__init__(message)
        self.errors = dict(errors)
        self.results = results


class Malformed(ValueError):
    """Bytes that do not follow the protocol. Such an entry becomes a dead letter; callers never see this error."""


class NewerVersion(Malformed):
    """An entry of a version that this program cannot read, but newer workers can."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the known name closest to `name`, or "" if none is close."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), "")


def _subclasses(cls: type[MillstreamError]) -> Iterable[type[MillstreamError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _subclasses(child)


# PartialFailure is made in the caller's process, from the errors of its rows; no reply contains it.
_BY_CODE = {cls.code: cls for cls in _subclasses(MillstreamError) if cls is not PartialFailure}

CODES = frozenset(_BY_CODE)
"""Codes of the errors that a reply may hold."""


def fault_of(code: str) -> Fault:
    """Returns whose fault an error with this code is; "service" if the code is unknown."""
    return _BY_CODE.get(code, MillstreamError).fault


def described(error: BaseException) -> str:
    """Returns type and message of any error, at most 500 characters. Never raises."""
    return _unicode(f"{type(error).__name__}: {message_of(error)}"[:500])


def message_of(error: BaseException) -> str:
    """Returns the message of any error, at most 500 characters. Never raises."""
    try:
        return _unicode(str(error)[:500])
    except BaseException:  # noqa: BLE001 - `__str__` may be a user's code: even its SystemExit must not end the worker
        return "its message cannot be read"


def _unicode(text: str) -> str:
    """Returns `text` with lone surrogates, which UTF-8 cannot encode, as backslash escapes."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def to_wire(error: MillstreamError) -> dict[str, object]:
    """Returns the error as a JSON object of a reply."""
    wire: dict[str, object] = {"code": error.code, "message": _unicode(error.message), "hint": _unicode(error.hint)}
    if error.retry_after is not None:
        wire["retry_after"] = error.retry_after
    return wire | error.details()


def from_wire(wire: Mapping[str, object]) -> MillstreamError:
    """Returns the error of a reply. A code of a newer worker that is unknown here gives the base class."""
    cls = _BY_CODE.get(str(wire.get("code")), MillstreamError)
    extra = {name: str(wire[name]) for name in cls("").details() if name in wire}
    retry_after = wire.get("retry_after")
    return cls(
        str(wire.get("message", "")),
        hint=str(wire.get("hint", "")),
        # Callers sleep so long: it must be neither negative nor endless.
        retry_after=float(retry_after) if isinstance(retry_after, int | float) and 0 <= retry_after < 1e9 else None,
        **extra,
    )
