"""A cache of results for rows that are sent again. A digest of all that determines a result is its key.

Callers read the cache, workers write it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, cast

import numpy as np
import redis

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.job import Encoded, Json, Scalar
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.streams import LONGEST_MS
from millstream.broker.transport.cluster import owner

CHUNK = 512
"""Most keys of one MGET or of one pipeline of SETs, so that other clients of the server wait only briefly."""

MOST_MEMORY = 0.75
"""Share of the server's maxmemory above which nothing is cached: the rest is for jobs."""

MOST_OF_HOST = 0.5
"""Share of the host's memory above which nothing is cached, if the server has no maxmemory."""

MOST_UNKNOWN = 1024**3
"""Bytes of the server's memory above which nothing is cached, if it reports neither."""

LOOK_S = 1.0
"""Seconds between two checks of the server's memory."""

_DIGEST_BYTES = 16
_VERSION = 1
_TRUNCATED, _JSON = 1, 2
_DTYPES: Mapping[int, np.dtype[Scalar]] = {0: np.dtype("<f4"), 8: np.dtype("<f2"), 16: np.dtype("u1")}
"""Dtype of a cached vector, by its flag in the first byte."""
_FLAGS: Mapping[object, int] = {dtype: flag for flag, dtype in _DTYPES.items()}


class Cached(NamedTuple):
    """The result of one row: a vector [dim] or a JSON value.

    `truncated`: the text was truncated. `fingerprint` names the weights.
    """

    result: Encoded | Json
    truncated: bool = False
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class CacheKey:
    """All that determines a result besides the row and the call's options: weights, operation and settings."""

    fingerprint: str
    op: str
    truncate: str
    max_length: int | None

    @classmethod
    def of(cls, spec: ServiceSpec, fingerprint: str, op: str) -> CacheKey:
        return cls(fingerprint, op, spec.runtime.truncate, spec.model.max_length)

    def digests(self, texts: Iterable[str], options: Mapping[str, Json]) -> list[str]:
        """Returns the cache key of each text, 32 hex digits. JSON must be able to represent `options`."""
        parts = (_VERSION, self.fingerprint, self.op, self.truncate, self.max_length, _canonical(options))
        # Unambiguous: JSON delimits the parts and has no zero byte, so the text starts after the first one.
        common = hashlib.blake2b(json.dumps(parts).encode() + b"\0", digest_size=_DIGEST_BYTES)
        return [_digest_of(common, text) for text in texts]


def _canonical(options: Mapping[str, Json]) -> str:
    """Returns the options as JSON, equal for a caller's own values and for those that a worker decodes."""
    return json.dumps(json.loads(json.dumps(options)), sort_keys=True) if options else "{}"


def _digest_of(common: hashlib.blake2b, text: str) -> str:
    digest = common.copy()
    digest.update(text.encode(errors="surrogatepass"))
    return digest.hexdigest()


def encode(cached: Cached) -> bytes:
    """Returns one byte of flags, then the vector's little-endian bytes or JSON.

    Raises TypeError, ValueError or RecursionError if JSON cannot represent the result.
    """
    flags = _TRUNCATED if cached.truncated else 0
    if isinstance(cached.result, np.ndarray):
        flag = _FLAGS.get(cached.result.dtype, 0)
        return bytes((flags | flag,)) + np.ascontiguousarray(cached.result, dtype=_DTYPES[flag]).tobytes()
    return bytes((flags | _JSON,)) + json.dumps(cached.result, ensure_ascii=False, allow_nan=False).encode()


def decode(blob: bytes | None) -> Cached | None:
    """Returns what `encode` wrote, with a read-only vector; None, a cache miss, if `blob` is anything else."""
    if not blob:
        return None
    kind, truncated = blob[0] & ~_TRUNCATED, bool(blob[0] & _TRUNCATED)
    if kind in _DTYPES:
        if len(blob) == 1 or (len(blob) - 1) % _DTYPES[kind].itemsize:
            return None
        # A copy without the flags: a view that starts at the second byte would not be aligned.
        vector = np.frombuffer(blob[1:], _DTYPES[kind])
        return Cached(vector, truncated) if b"\0" not in np.isfinite(vector).tobytes() else None
    if kind != _JSON:
        return None
    try:
        return Cached(json.loads(blob[1:], parse_constant=_refuse), truncated)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a result")


def _has_room(memory: Mapping[str, int]) -> bool:
    """Tells if the server has memory for more results, given its INFO memory."""
    limit, host = memory.get("maxmemory", 0), memory.get("total_system_memory", 0)
    most = limit * MOST_MEMORY or host * MOST_OF_HOST or MOST_UNKNOWN
    return memory["used_memory"] < most


class Cache:
    """The cached results of one service.

    Errors of the server are not raised, because a job must not fail for its cache: `faults` counts them, and `fault` is
    the last one.
    """

    def __init__(self, client: redis.Redis, keys: ServiceKeys) -> None:
        self._client = client
        self._keys = keys
        self._looked_at = float("-inf")
        self._room = True
        self.faults = 0
        self.fault: redis.RedisError | None = None

    def look_up(self, digests: Sequence[str]) -> list[Cached | None]:
        """Returns the result under each of `digests`, None for a miss. After an error the rest are misses."""
        found: list[Cached | None] = []
        try:
            for at in range(0, len(digests), CHUNK):
                names = [self._keys.cache(digest) for digest in digests[at : at + CHUNK]]
                blobs = cast(list[bytes | None], self._client.mget(names))
                found += map(decode, blobs)
        except redis.RedisError as error:
            self._note(error)
        return found + [None] * (len(digests) - len(found))

    def keep(self, answers: Sequence[tuple[str, bytes]], ttl_s: float) -> None:
        """Writes encoded results, (digest, bytes), for `ttl_s` seconds; none if the server is short of memory."""
        ttl_ms = max(1, round(min(ttl_s * 1000, LONGEST_MS)))
        try:
            if not answers or not self._has_room(answers[0][0]):
                return
            for at in range(0, len(answers), CHUNK):
                pipe = self._client.pipeline(transaction=False)
                for digest, blob in answers[at : at + CHUNK]:
                    pipe.set(self._keys.cache(digest), blob, px=ttl_ms)
                for answer in pipe.execute(raise_on_error=False):
                    if isinstance(answer, redis.RedisError):
                        self._note(answer)
        except redis.RedisError as error:
            self._note(error)

    def _has_room(self, digest: str) -> bool:
        if time.monotonic() - self._looked_at > LOOK_S:
            node = owner(self._client, self._keys.cache(digest))
            self._room = _has_room(cast(Mapping[str, int], node.info("memory")))
            self._looked_at = time.monotonic()
        return self._room

    def _note(self, error: redis.RedisError) -> None:
        self.faults += 1
        self.fault = error
