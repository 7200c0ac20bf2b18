"""Maps the library's errors to ours, in this module only, and tells which of them are transient."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from redis import exceptions as theirs
from redis.sentinel import MasterNotFoundError

from millstream.broker.config.variables import URL_VARIABLE
from millstream.broker.contract.errors import BrokerUnavailable, MillstreamError, QueueFull
from millstream.broker.roles import advice

T = TypeVar("T")

START_ONE = f"start one with `millstream up`, or set {URL_VARIABLE}"

_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class _Fault:
    """One kind of server failure, recognized by the error's class or, if a script's error wraps it, by its words.

    `summary` continues "Redis at URL ..." in our message. `transient`: the same call may succeed later.
    """

    summary: str
    hint: str | Callable[[str], str]
    """The fix, or a function that derives it from the error's message."""
    transient: bool
    classes: tuple[type[Exception], ...] = ()
    words: tuple[str, ...] = ()

    def explains(self, error: theirs.RedisError) -> bool:
        return isinstance(error, self.classes) or any(word in str(error) for word in self.words)


# The first fault that explains an error counts. The order matters: in the library, authentication and loading errors
# are connection errors too.
_FAULTS = (
    _Fault(
        "refuses this user",
        advice,
        transient=False,
        classes=(
            theirs.AuthenticationError,
            theirs.AuthenticationWrongNumberOfArgsError,
            theirs.AuthorizationError,
            theirs.NoPermissionError,
        ),
        words=("NOAUTH", "NOPERM", "WRONGPASS"),
    ),
    _Fault(
        "has lost the scripts, and this user may not load them",
        "start a worker: it loads them",
        transient=True,
        classes=(theirs.NoScriptError,),
        words=("NOSCRIPT",),
    ),
    _Fault(
        "is loading its data",
        "wait until it is done",
        transient=True,
        classes=(theirs.BusyLoadingError,),
        words=("LOADING Redis", "LOADING Valkey"),
    ),
    _Fault(
        "is a read-only replica",
        "point the URL at the primary",
        transient=True,
        classes=(theirs.ReadOnlyError,),
        words=("READONLY", "previous master", "force unblock"),
    ),
    _Fault("cannot write to its disk", "free disk space and see its log", transient=True, words=("MISCONF",)),
    _Fault("has too few replicas to accept writes", "see min-replicas-to-write", transient=True, words=("NOREPLICAS",)),
    _Fault(
        "is busy running a script",
        "wait, or end it with SCRIPT KILL",
        transient=True,
        words=("BUSY Redis", "BUSY Valkey"),
    ),
    _Fault(
        "is moving keys between the nodes of its cluster",
        "wait until the move is over",
        transient=True,
        classes=(theirs.TryAgainError,),
        words=("TRYAGAIN", "UNBLOCKED", "redirected again and again"),
    ),
    _Fault(
        "has no database of this number",
        "name another one in the URL, after the host and a slash; most servers have 0 to 15, a Cluster has only 0",
        transient=False,
        words=("DB index is out of range", "invalid DB index", "SELECT is not allowed"),
    ),
    _Fault(
        "is one node of a cluster",
        "say redis+cluster:// in the URL",
        transient=False,
        classes=(theirs.AskError,),  # MOVED is one, too
    ),
    _Fault(
        "is no cluster",
        "say redis:// in the URL, or set cluster-enabled",
        transient=False,
        words=("cluster support disabled",),
    ),
    _Fault(
        "is a cluster that is not whole",
        "see CLUSTER INFO",
        transient=True,
        classes=(theirs.ClusterError,),
        words=("CLUSTERDOWN", "MASTERDOWN"),
    ),
    _Fault(
        "has no master at the moment",
        "wait for the Sentinels to choose one; see SENTINEL MASTERS, and the master's name in the URL",
        transient=True,
        classes=(MasterNotFoundError,),
    ),
    _Fault(
        "accepts no more connections", "raise its maxclients", transient=True, words=("max number of clients reached",)
    ),
    _Fault(
        "has no connection left for this process",
        "use fewer threads",
        transient=True,
        classes=(theirs.MaxConnectionsError,),
    ),
    _Fault(
        "has a TLS certificate that cannot be verified",
        "check ssl_ca_certs in the URL, and that the server's certificate names the URL's host",
        transient=False,
        words=("CERTIFICATE_VERIFY_FAILED",),
    ),
    _Fault(
        "does not speak TLS",
        "say redis:// in the URL, or give the port that speaks TLS",
        transient=False,
        words=("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"),
    ),
    _Fault(
        "cannot be called with this certificate",
        "check ssl_certfile and ssl_keyfile in the URL: certificate and key belong together, both in PEM",
        transient=False,
        words=("KEY_VALUES_MISMATCH", "PEM lib", "NO_CERTIFICATE_OR_CRL_FOUND"),
    ),
    _Fault(
        "ended the TLS connection",
        "see its log; it may ask for a certificate, which ssl_certfile and ssl_keyfile in the URL give",
        transient=True,
        words=("EOF occurred in violation of protocol", "ALERT_CERTIFICATE_REQUIRED", "alert certificate required"),
    ),
    _Fault(
        "did not accept the connection in time",
        "it is overloaded, frozen or cut off; or the URL says rediss:// and the server does not speak TLS",
        transient=True,
        words=("Timeout connecting to server",),
    ),
    _Fault(
        "cut the connection",
        "see its log; if it speaks TLS, the URL must say rediss://, and it may ask for a certificate (ssl_certfile)",
        transient=True,
        words=("reset by peer",),
    ),
    _Fault("did not answer in time", "it is overloaded, frozen or cut off", True, (theirs.TimeoutError,)),
    _Fault("cannot be reached", START_ONE, transient=True, classes=(theirs.ConnectionError,)),
    _Fault(
        "does not speak the Redis protocol", "check host and port", transient=False, classes=(theirs.InvalidResponse,)
    ),
)


def _fault(error: BaseException) -> _Fault | None:
    if not isinstance(error, theirs.RedisError):
        return None
    return next((fault for fault in _FAULTS if fault.explains(error)), None)


def is_transient(error: BaseException) -> bool:
    """Returns whether the same call may succeed later with the same arguments, user and URL."""
    if isinstance(error, BrokerUnavailable):
        return error.__cause__ is None or is_transient(error.__cause__)
    fault = _fault(error)
    return fault is not None and fault.transient


def is_missing_group(error: object) -> bool:
    """Returns whether `error` says that a stream or its consumer group does not exist, as after FLUSHALL.

    `create_groups` makes both again. Some servers wrap the error of a command in a script's own error.
    """
    return isinstance(error, theirs.ResponseError) and "NOGROUP" in str(error)


class translated:
    """Context that raises the library's errors as ours; `where` is the connection's `safe_url`.

    Raises BrokerUnavailable if the server cannot be used, QueueFull if it is out of memory. Errors that answer the
    command itself (NOGROUP, WRONGTYPE) pass through unchanged.
    """

    __slots__ = ("_where",)

    # A class, because a generator's context costs three times the calls, and each job passes one.
    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, theirs.RedisError) and (ours := _translation(error, self._where)):
            raise ours from error


def _translation(error: theirs.RedisError, where: str) -> MillstreamError | None:
    if isinstance(error, theirs.OutOfMemoryError) or "OOM command not allowed" in str(error):
        hint = "drain the queue or raise the server's maxmemory"
        return QueueFull(f"Redis at {where} is out of memory", hint=hint, retry_after=1.0)
    fault = _fault(error)
    if fault is None:
        return None
    hint = fault.hint if isinstance(fault.hint, str) else fault.hint(str(error))
    return BrokerUnavailable(f"Redis at {where} {fault.summary}: {error}", hint=hint)


def retrying(action: Callable[[], T], *, until: float | None = None, stop: threading.Event | None = None) -> T:
    """Repeats an idempotent `action` while it fails for a transient reason, and returns its result.

    Pauses grow from 20 ms to 1 s, with jitter, so that callers that lost a server do not all return at the same moment.
    Raises the last error if it is not transient, if the next try would start after `until` (monotonic seconds; None: no
    limit), or if `stop` is set.
    """
    stop = stop or threading.Event()
    longest = _FIRST_PAUSE_S
    while True:
        try:
            return action()
        except Exception as error:
            pause = random.uniform(longest / 2, longest)
            late = until is not None and time.monotonic() + pause > until
            if late or not is_transient(error) or stop.wait(pause):
                raise
        longest = min(longest * 2, _LONGEST_PAUSE_S)
