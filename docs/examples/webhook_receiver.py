"""Receives webhooks: verifies each announcement, and prints each call that is done once.

Run it with the port and the file that webhooks.secret_file of config.yaml names.
"""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

from millstream.client import MillstreamError
from millstream.client.webhooks import ID_HEADER, verify

MOST_BYTES = 65_536


class Receiver(BaseHTTPRequestHandler):
    secret = ""
    seen: ClassVar[set[str]] = set()

    def do_POST(self) -> None:
        body = self.rfile.read(min(int(self.headers.get("Content-Length", 0)), MOST_BYTES))
        try:
            outcome = verify(dict(self.headers), body, self.secret)
        except MillstreamError:
            self.send_error(400)
            return
        # An announcement may come twice. Real receivers remember its id in their database.
        if self.headers[ID_HEADER] not in self.seen:
            self.seen.add(self.headers[ID_HEADER])
            print(f"{outcome.id} is {outcome.state}: {outcome.failed} of {outcome.rows} rows failed", flush=True)
        # Answer soon, and do the work afterwards: after 10 seconds the announcement is sent again.
        self.send_response(204)
        self.end_headers()


if __name__ == "__main__":
    Receiver.secret = Path(sys.argv[2]).read_text().splitlines()[0]
    with ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Receiver) as server:
        print(f"listening on {server.server_port}", flush=True)
        server.serve_forever()
