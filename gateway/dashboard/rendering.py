"""Makes pages of figures. All that is inserted into a page is escaped; a missing name is an error."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from http import HTTPStatus
from importlib import resources
from importlib.metadata import version
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from millstream.broker.contract.job import PRIORITIES
from millstream.broker.queue.figure_text import age, attempt, iso_time, latency, memory, number, quantity, rate, seconds
from millstream.gateway.dashboard.badges import badges

STATIC = resources.files("millstream.gateway.dashboard") / "static"


class Renderer:
    """The templates, for a dashboard of the server `where` under the path `root`."""

    def __init__(self, where: str, root: str = "") -> None:
        self._environment = Environment(
            loader=PackageLoader("millstream.gateway.dashboard"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters |= {
            "age": age,
            "attempt": attempt,
            "iso_time": iso_time,
            "latency": latency,
            "memory": memory,
            "number": number,
            "part": lambda text: quote(text, safe=""),
            "percent": percent,
            "quantity": quantity,
            "rate": rate,
            "seconds": seconds,
        }
        self._environment.globals |= {
            "asset": lambda name: f"{root}/static/{name}?{_digest(name)}",
            "badges": badges,
            "priorities": PRIORITIES,
            "root": root,
            "version": version("millstream"),
            "where": where,
        }

    def page(self, template: str, **values: object) -> str:
        """Returns the page of a template."""
        return self._environment.get_template(template).render(values)

    def error(self, status: int, text: str, path: str = "") -> str:
        """Returns the page of an error. `path`: the page that may be there in a moment, which it asks for again."""
        title = HTTPStatus(status).phrase
        return self.page("error.html", title=title, text=text, path=path, may_act=False)


def percent(share: float | None) -> str:
    """Returns a share, 0 to 1, as text; a dash if it is None."""
    return "-" if share is None else f"{share:.0%}"


_digests: Mapping[str, str] = {
    file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in STATIC.iterdir()
}


def _digest(name: str) -> str:
    """Returns a text that changes with the file, so that browsers may keep the file for ever."""
    return _digests[name]
