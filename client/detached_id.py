"""Id of a detached call, which says its service and how its rows are split into jobs. Pure."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from millstream.broker.contract.errors import InvalidRequest
from millstream.client.split import Part

MAX_JOBS = 100_000
"""Jobs that one detached call has at most."""

_ID = re.compile(
    r"(?P<service>[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}):(?P<rows>[1-9]\d{0,8})x(?P<per_job>[1-9]\d{0,3}):(?P<call>[0-9a-f]{32})"
)


@dataclass(frozen=True, slots=True)
class DetachedId:
    """Id of a detached call: `service:ROWSxROWS_PER_JOB:call`. `call` is the id of its first job.

    Raises InvalidRequest if the call has more than MAX_JOBS jobs: an id is untrusted input, and one with too many jobs
    must not exhaust the memory of the process.
    """

    service: str
    rows: int
    per_job: int
    call: str

    def __post_init__(self) -> None:
        if self.rows > self.per_job * MAX_JOBS:
            raise InvalidRequest(
                f"{self.rows} rows are more than {MAX_JOBS} jobs of {self.per_job}", hint="make several calls"
            )

    @classmethod
    def parse(cls, text: str) -> DetachedId:
        """Returns the id that `text` is. Raises InvalidRequest if it is none."""
        match = _ID.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            named = str(text)[:200]
            raise InvalidRequest(f"{named!r} is no id of a detached call", hint="such as embed:8x8:9f86d0...")
        return cls(match["service"], int(match["rows"]), int(match["per_job"]), match["call"])

    @classmethod
    def of_job(cls, service: str, rows: int, job_id: str) -> DetachedId:
        """Returns the id of the call of one job, such as that of a dead letter that runs again."""
        return cls(service, rows, rows, job_id)

    def __str__(self) -> str:
        return f"{self.service}:{self.shape}:{self.call}"

    @property
    def shape(self) -> str:
        """Number of rows of the call and of each job."""
        return f"{self.rows}x{self.per_job}"

    def split(self) -> dict[str, Part]:
        """Returns the rows that each job carries, by job id."""
        return {
            self._name_job(first): Part(tuple(range(first, min(first + self.per_job, self.rows))), 0)
            for first in range(0, self.rows, self.per_job)
        }

    def _name_job(self, first: int) -> str:
        """Returns the id of the job whose first row is `first`."""
        return self.call if first == 0 else hashlib.sha256(f"{self.call}/{first}".encode()).hexdigest()[:32]
