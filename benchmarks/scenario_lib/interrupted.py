"""A program whose user presses Ctrl-C amid `embed`, and that lives on: interrupted.py URL SERVICE ROWS.

Prints "calling" before the call and "interrupted" after it; ends with its standard input.
"""

from __future__ import annotations

import sys

from millstream.client import Client


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    url, service, rows = sys.argv[1:]
    client = Client(url)
    texts = [f"row {number}" for number in range(int(rows))]
    client.embed(texts[:1], service=service)
    say("calling")
    try:
        client.embed(texts, service=service)
        say("answered")
    except KeyboardInterrupt:
        say("interrupted")
    sys.stdin.read()


if __name__ == "__main__":
    main()
