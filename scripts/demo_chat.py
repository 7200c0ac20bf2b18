"""The demo of text generation: a language model tells a story, its worker is killed in mid-sentence, the story goes on.

It is what `scripts/demo --chat` runs, on the config of docs/examples/chat.yaml and a server of its own in a temporary
folder. Everything is stopped at the end.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# python -P keeps this folder off the path, so that no file here hides a module of a library. Last, it hides none.
sys.path.append(str(Path(__file__).parent))

from demo import look, millstream_up, out, wait_for
from rich.table import Table

from millstream.broker.config.load import load
from millstream.broker.contract.errors import MillstreamError
from millstream.broker.queue.inspector import Inspector, ServiceView
from millstream.broker.transport.connection import Connection
from millstream.client import Client

CONFIG = Path(__file__).resolve().parents[1] / "docs" / "examples" / "chat.yaml"
SERVICE = "chat"

QUESTION = "What is the capital of France?"
STORY = "Tell me a short story about a water mill, a miller and a storm."
SAMPLED: Mapping[str, float | int] = {"max_tokens": 100, "temperature": 0.7, "seed": 2026}
"""Options of the story. A seed makes a sampled text repeatable."""

GREEDY: Mapping[str, float | int] = {"max_tokens": 40, "temperature": 0}

LEAST_CHARACTERS = 200
"""Characters of the story before its worker is killed."""

SENTENCE_ENDS = (".", "!", "?", '"')

Speak = Callable[[str, Mapping[str, float | int]], Iterator[str]]
"""Asks the service a question, and yields the pieces of the answer."""


@dataclass
class Telling:
    """One answer: its text, the seconds to its first piece, in all, and of the longest pause between two pieces."""

    text: str = ""
    first_s: float = 0.0
    seconds: float = 0.0
    pause_s: float = 0.0
    pieces: int = 0


@dataclass
class Victim:
    """The worker that was killed. `at`: characters of the story that its caller had then."""

    pid: int = 0
    at: int = 0


class ChatDemo:
    """The steps, over one running stack."""

    def __init__(self, speak: Speak, view: Callable[[], ServiceView], workers: int) -> None:
        self._speak = speak
        self._view = view
        self._workers = workers

    def show(self) -> bool:
        """Runs all steps. Returns whether everything was as it should be."""
        wait_for(self._all_ready)
        out.print(f"\n[bold]{QUESTION}[/bold]")
        answer = self._tell(QUESTION, GREEDY)
        out.print(f"\n[bold]{STORY}[/bold]  (sampled, with a seed)")
        undisturbed = self._tell(STORY, SAMPLED)
        wait_for(self._all_ready)
        out.print("\n[bold]the same again, and the worker that tells it is killed with SIGKILL in mid-sentence:[/bold]")
        victim = Victim()
        again = self._tell(STORY, SAMPLED, lambda text: self._kill_in_mid_sentence(text, victim))
        whole_s = self._until_whole()
        return report(answer, undisturbed, again, victim, self._view(), whole_s)

    def _tell(self, question: str, options: Mapping[str, float | int], then: Callable[[str], None] = str) -> Telling:
        """Prints an answer while it is generated, and calls `then` with the text after each piece."""
        telling = Telling()
        began = last = time.monotonic()
        for piece in self._speak(question, options):
            now = time.monotonic()
            telling.first_s = telling.first_s or now - began
            # The wait for the first piece is no pause in a text.
            telling.pause_s = max(telling.pause_s, now - last) if telling.pieces else 0.0
            telling.pieces += 1
            telling.text += piece
            out.print(piece, end="", markup=False, soft_wrap=True)
            then(telling.text)
            last = now
        telling.seconds = time.monotonic() - began
        out.print()
        return telling

    def _kill_in_mid_sentence(self, text: str, victim: Victim) -> None:
        if victim.pid or len(text) < LEAST_CHARACTERS or text.rstrip()[-1:] in SENTENCE_ENDS:
            return
        held = [worker for worker in self._view().workers if self._view().held.get(worker.consumer)]
        if not held:
            return
        victim.pid, victim.at = held[0].pid, len(text)
        os.kill(victim.pid, signal.SIGKILL)
        out.print(f"[bold red]|worker {victim.pid} killed|[/bold red]", end="", soft_wrap=True)

    def _all_ready(self) -> bool:
        view = self._view()
        return len([each for each in view.workers if each.state != "starting"]) == self._workers and not view.in_flight

    def _until_whole(self) -> float:
        began = time.monotonic()
        wait_for(self._all_ready)
        return time.monotonic() - began


def report(
    answer: Telling, undisturbed: Telling, again: Telling, victim: Victim, view: ServiceView, whole_s: float
) -> bool:
    """Prints the figures. Returns whether nothing was lost, doubled or changed."""
    heading = ("", "first piece s", "pieces/s", "longest pause s")
    table = Table(*heading, box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name, each in (("question", answer), ("story, undisturbed", undisturbed), ("story, worker killed", again)):
        rate = each.pieces / each.seconds if each.seconds else 0.0
        table.add_row(name, f"{each.first_s:.2f}", f"{rate:.0f}", f"{each.pause_s:.2f}")
    same = again.text == undisturbed.text
    left = view.depth + view.in_flight
    out.print()
    out.print(table)
    if victim.pid:
        out.print(f"worker {victim.pid} was killed after {victim.at} of {len(again.text)} characters")
    else:
        out.print("NO WORKER WAS KILLED: the story ended before it had enough characters")
    out.print(f"the story that survived equals the undisturbed one: {'yes' if same else 'NO'}")
    out.print(f"left over: {left}   dead letters: {view.dead_letters}   all workers ran {whole_s:.1f} s after its end")
    return bool(victim.pid and same and answer.text and not left and not view.dead_letters)


def chat(client: Client) -> Speak:
    """Returns the way to ask the chat service of `client`."""

    def speak(question: str, options: Mapping[str, float | int]) -> Iterator[str]:
        messages: Sequence[Mapping[str, str]] = [{"role": "user", "content": question}]
        with client.chat_stream(messages, service=SERVICE, **options) as stream:
            for delta in stream:
                if delta.text:
                    yield delta.text

    return speak


def main() -> int:
    spec = load(CONFIG).services[SERVICE]
    out.print(f"model: {spec.model.model_name}, {spec.model.dtype}")
    good = run(CONFIG, chat)
    out.print("stopped: no process is left")
    return 0 if good else 1


def run(config: Path, speaks: Callable[[Client], Speak]) -> bool:
    """Runs the demo on the service of `config`. Returns whether everything was as it should be."""
    workers = load(config).services[SERVICE].runtime.worker_count
    out.print(f"starting the server and {workers} workers ...")
    # Messages of the workers would stand in the middle of the story.
    with tempfile.TemporaryDirectory(prefix="millstream-demo-") as folder, tempfile.TemporaryFile() as log:
        try:
            good = _run(Path(folder), config, speaks, workers, log)
        except (Exception, SystemExit):
            _print(log)
            raise
        if not good:
            _print(log)
    return good


def _run(folder: Path, config: Path, speaks: Callable[[Client], Speak], workers: int, log: IO[bytes]) -> bool:
    with millstream_up(folder, config, log) as url:
        connection = Connection(url)
        inspector = Inspector(connection)
        with Client(url) as client:
            demo = ChatDemo(speaks(client), lambda: inspector.services([SERVICE])[0], workers)
            good = demo.show()
        look(url, SERVICE)
        connection.close()
        out.print("\nstopping ...")
    return good


def _print(log: IO[bytes]) -> None:
    """Prints the messages of `millstream up` and its workers, which explain a failure."""
    log.seek(0)
    sys.stderr.write(log.read().decode(errors="replace"))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except MillstreamError as error:
        sys.exit(f"demo: {error}")
