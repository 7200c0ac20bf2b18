"""Every error a caller can meet: one hierarchy, whose class says whose fault it is and whether trying again helps."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

Fault = Literal["caller", "service", "infrastructure"]


class MillstreamError(Exception):
    """Base of all. `code` travels in replies; `hint` says what to do about it; `retry_after` is in seconds."""

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
        """Fields that a subclass adds to the wire form, by the names of its constructor's arguments."""
        return {}


class InvalidRequest(MillstreamError):
    """The request itself is wrong: not a string, an unknown option, a text that is not valid Unicode."""

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
    """No answer in time. `phase` says where the time went: queue, inference or total."""

    code = "deadline_exceeded"
    retryable = True
    exit_code = 7

    def __init__(self, message: str, *, phase: str = "total", hint: str = "", retry_after: float | None = None) -> None:
        super().__init__(message, hint=hint, retry_after=retry_after)
        self.phase = phase

    def details(self) -> dict[str, str]:
        return {"phase": self.phase}


class QueueFull(MillstreamError):
    """The service holds `max_queue_size` jobs already; nothing was accepted."""

    code = "queue_full"
    retryable = True
    exit_code = 8


class RateLimited(MillstreamError):
    """The service's rate limit is used up for the moment; nothing was accepted."""

    code = "rate_limited"
    retryable = True
    exit_code = 8


class ServicePaused(MillstreamError):
    """The service is paused and takes no new jobs meanwhile; nothing was accepted."""

    code = "service_paused"
    retryable = True
    exit_code = 8


class ModelFailed(MillstreamError):
    """The model raised, or answered something unusable, on this input alone."""

    code = "model_failed"
    exit_code = 9


class ModelUnavailable(ModelFailed):
    """The model cannot be loaded: no such folder, missing package, not enough memory."""

    code = "model_unavailable"


class MixedModels(ModelFailed):
    """Parts of one call were answered by different models, such as while weights are being changed."""

    code = "mixed_models"
    retryable = True


class UnsupportedVersion(MillstreamError):
    """The job was written by a newer client than the worker that got it can read: update the workers."""

    code = "unsupported_version"
    fault = "infrastructure"
    exit_code = 9


class ReplyTooLarge(MillstreamError):
    """The job's answer has more bytes than a reply may have; the job ran, and would end so again."""

    code = "reply_too_large"
    fault = "caller"
    exit_code = 9


class ReaderTooSlow(MillstreamError):
    """The client leaves so many answers unread that this job's answer was dropped; the job ran."""

    code = "reader_too_slow"
    retryable = True
    fault = "caller"
    exit_code = 9


class WorkerLost(MillstreamError):
    """Workers died each time they ran this job: it was buried among the dead letters."""

    code = "worker_lost"
    exit_code = 9


class Cancelled(MillstreamError):
    """The job was cancelled before it ran to its end."""

    code = "cancelled"
    fault = "caller"


class ResultExpired(MillstreamError):
    """The job was answered, and its answer's lifetime is over."""

    code = "result_expired"
    fault = "caller"


class PartialFailure(MillstreamError):
    """Some rows of a call failed. `errors` maps their index to an error; `results` has None in their places."""

    code = "partial_failure"
    exit_code = 9

    def __init__(self, message: str, *, errors: Mapping[int, MillstreamError], results: list[object]) -> None:
        super().__init__(message)
        self.errors = dict(errors)
        self.results = results


class Malformed(ValueError):
    """Bytes from the wire that are not what they should be; buried, never raised to a caller."""


class NewerVersion(Malformed):
    """An entry of a version that this program does not read: not malformed, but for newer workers."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known name closest to `name`, or an empty string."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), "")


def _subclasses(cls: type[MillstreamError]) -> Iterable[type[MillstreamError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _subclasses(child)


# PartialFailure is made in the caller's process, of the rows' own errors; it never travels.
_BY_CODE = {cls.code: cls for cls in _subclasses(MillstreamError) if cls is not PartialFailure}


def described(error: BaseException) -> str:
    """Type and message of an error that is none of ours, at most 500 characters. Raises nothing, whatever it is."""
    return _unicode(f"{type(error).__name__}: {message_of(error)}"[:500])


def message_of(error: BaseException) -> str:
    """The message alone, at most 500 characters. Raises nothing."""
    try:
        return _unicode(str(error)[:500])
    except BaseException:  # noqa: BLE001 - the code that a user brings makes this text, and what it raises is no order
        return "its message cannot be read"


def _unicode(text: str) -> str:
    """`text`, with half characters, which no JSON carries, written out."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def to_wire(error: MillstreamError) -> dict[str, object]:
    """The error as it travels inside a reply."""
    wire: dict[str, object] = {"code": error.code, "message": _unicode(error.message), "hint": _unicode(error.hint)}
    if error.retry_after is not None:
        wire["retry_after"] = error.retry_after
    return wire | error.details()


def from_wire(wire: Mapping[str, object]) -> MillstreamError:
    """The error a reply carries. An unknown code, from a newer worker, becomes the base class with its message."""
    cls = _BY_CODE.get(str(wire.get("code")), MillstreamError)
    extra = {name: str(wire[name]) for name in cls("").details() if name in wire}
    retry_after = wire.get("retry_after")
    return cls(
        str(wire.get("message", "")),
        hint=str(wire.get("hint", "")),
        # Callers sleep for it: neither negative nor without end.
        retry_after=float(retry_after) if isinstance(retry_after, int | float) and 0 <= retry_after < 1e9 else None,
        **extra,
    )
