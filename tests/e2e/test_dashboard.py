"""The command `millstream dashboard`, from its first line to Ctrl-C."""

from __future__ import annotations

import http.client
import re
from contextlib import closing
from pathlib import Path

from e2e.cli_support import Shell
from support import eventually

from millstream.broker.server.embedded import EmbeddedServer


def test_the_command_serves_until_it_is_interrupted(tmp_path: Path, server: EmbeddedServer) -> None:
    with Shell(tmp_path, server.url).background("dashboard", "--port", "0", "--root-path", "/queues") as dashboard:
        dashboard.says("dashboard: http://127.0.0.1:")
        found = re.search(r"http://127.0.0.1:(\d+)/queues/", dashboard.out)
        assert found
        with closing(http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=10)) as connection:
            connection.request("GET", "/queues/")
            assert connection.getresponse().status == 200

            # The connection stays open: the end does not wait for its browser to leave.
            dashboard.interrupt()
            eventually(lambda: dashboard.process.poll() is not None)

        assert (dashboard.process.returncode, dashboard.err) == (0, "")
