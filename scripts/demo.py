"""The main job, shown on real text: embed Python's own documentation through the queue, and kill a worker meanwhile.

Starts `millstream up` with the config.yaml beside it and a server of its own in a temporary folder, and stops both.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import IO, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from millstream.broker.config.load import load
from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.job import Vectors
from millstream.broker.queue.inspector import Inspector, ServiceView, WorkerView
from millstream.broker.server.embedded import running
from millstream.broker.transport.connection import Connection
from millstream.client import Client, Embeddings, Handle
from millstream.worker.models.loading.source import locate, weights_digest

T = TypeVar("T")

CONFIG = Path(__file__).resolve().parents[1] / "config.yaml"
COMMAND = Path(sys.executable).with_name("millstream")
SERVICE = "embed"
START_S = 180.0
LEAST_PARAGRAPH = 60
SAMPLE = 150
CLOSE = 1e-5
NO_BARS = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""For the environment: the libraries' own progress bars would run through the demo's."""

QUESTIONS = {
    "How do I write a small anonymous function?": "lambda",
    "How do I load another module into my program?": "import",
    "How do I step through my program to find a bug?": "debugger",
    "How do I define a class?": "class",
    "What does yield do inside a function?": "yield",
}

out = Console(highlight=False)


@dataclass(frozen=True)
class Paragraph:
    topic: str
    text: str


@dataclass(frozen=True)
class Pass:
    """One run over all paragraphs."""

    vectors: Embeddings
    seconds: float


@dataclass(frozen=True)
class Killing:
    """One worker killed under load: how many jobs it held.

    Seconds until they were given back to the queue, until others had them all, and until all workers ran.
    """

    pid: int
    held: int
    given_back_s: float
    handed_on_s: float
    whole_s: float


class Demo:
    """The steps, over one running stack."""

    def __init__(self, client: Client, inspector: Inspector, texts: list[str], workers: int) -> None:
        self._client = client
        self._inspector = inspector
        self._texts = texts
        self._workers = workers

    @property
    def doubled(self) -> int:
        """Answers that came for a job already answered."""
        return self._client.stray_replies

    def view(self) -> ServiceView:
        return self._inspector.services([SERVICE])[0]

    def embed_all(self, title: str, meanwhile: Callable[[Handle], None] = lambda handle: None) -> Pass:
        """Every paragraph once, behind a progress bar."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=out) as progress:
            bar = progress.add_task(title, total=len(self._texts))
            began = time.monotonic()
            handle = self._client.submit(SERVICE, self._texts, priority="batch", truncate="end")
            while not handle.wait(0.1):
                progress.update(bar, completed=handle.rows_done)
                meanwhile(handle)
            vectors = handle.result()
            seconds = time.monotonic() - began
            progress.update(bar, completed=len(self._texts))
        assert isinstance(vectors, Embeddings)
        return Pass(vectors, seconds)

    def kill_one(self) -> Killing:
        """SIGKILL to a worker that holds jobs, and what follows."""
        victim, held = self._busy_worker()
        os.kill(victim.pid, signal.SIGKILL)
        began = time.monotonic()
        wait_for(lambda: not self.view().held.get(victim.consumer))
        given_back_s = time.monotonic() - began
        wait_for(lambda: not self.view().returned)
        handed_on_s = time.monotonic() - began
        wait_for(lambda: self._others_ready(victim))
        return Killing(victim.pid, held, given_back_s, handed_on_s, time.monotonic() - began)

    def _busy_worker(self) -> tuple[WorkerView, int]:
        def find() -> tuple[WorkerView, int] | None:
            view = self.view()
            busy = [(worker, view.held.get(worker.consumer, 0)) for worker in view.workers]
            return next(((worker, held) for worker, held in busy if held), None)

        return wait_for(find)

    def _others_ready(self, victim: WorkerView) -> bool:
        ready = [worker for worker in self.view().workers if worker.consumer != victim.consumer]
        return len(ready) == self._workers


def main() -> int:
    config = load(CONFIG)
    spec = config.services[SERVICE]
    weights = locate(spec.model.model_name)
    assert isinstance(weights, Path)
    read = paragraphs()
    out.print(f"weights: {spec.model.model_name}, sha256 {weights_digest(weights)}")
    out.print(f"texts:   {len(read)} paragraphs of Python's documentation ({len(topics)} topics)")
    with tempfile.TemporaryDirectory(prefix="millstream-demo-") as folder:
        out.print(f"starting the server and {spec.runtime.worker_count} workers ...")
        with millstream_up(Path(folder)) as url:
            connection = Connection(url)
            with Client(url) as client:
                demo = Demo(client, Inspector(connection), [each.text for each in read], spec.runtime.worker_count)
                wait_for(lambda: len(demo.view().workers) == spec.runtime.worker_count)
                good = show(demo, client, read, weights)
            look(url)
            connection.close()
            out.print("\nstopping ...")
    out.print("stopped: no process is left")
    return 0 if good else 1


def show(demo: Demo, client: Client, read: list[Paragraph], weights: Path) -> bool:
    """The two passes, the questions, the killing, the figures; whether all went as it should."""
    first = demo.embed_all("first pass ")
    counted = demo.view()
    cut = len(first.vectors.truncated)
    out.print(f"  {len(read)} vectors of {first.vectors.shape[1]} numbers; {cut} long paragraphs were cut and reported")
    found = answer(client, read, first.vectors)

    killings: list[Killing] = []

    def kill_midway(handle: Handle) -> None:
        if not killings and handle.rows_done > len(read) // 4:
            killings.append(demo.kill_one())

    out.print("\nthe same again, and a worker is killed with SIGKILL on the way:")
    second = demo.embed_all("second pass", kill_midway)
    unharmed = report_killing(demo, first, second, killings[0])
    report_speed(counted, first, reference(weights, [each.text for each in read], first.vectors))
    return found and unharmed


def answer(client: Client, read: list[Paragraph], vectors: Embeddings) -> bool:
    """Ask the questions; whether each found its topic among the first three."""
    table = Table("question", "nearest paragraphs", "topic", box=None, header_style="bold", padding=(0, 2, 0, 0))
    found = True
    for question, topic in QUESTIONS.items():
        similarity = np.asarray(vectors) @ np.asarray(client.embed(question, priority="realtime"))
        nearest = [read[at].topic for at in np.argsort(-similarity)[:3]]
        found &= topic in nearest
        table.add_row(question, ", ".join(nearest), f"{topic}: {'found' if topic in nearest else 'NOT FOUND'}")
    out.print()
    out.print(table)
    return found


def report_killing(demo: Demo, first: Pass, second: Pass, killing: Killing) -> bool:
    """Say what was lost and doubled; whether nothing was."""
    difference = float(np.abs(np.asarray(second.vectors) - np.asarray(first.vectors)).max())
    view = demo.view()
    left = view.depth + view.in_flight
    seen = (
        f"worker {killing.pid} was killed while it held {killing.held} jobs",
        f"its jobs were given back after {killing.given_back_s:.1f} s; every worker ran after {killing.whole_s:.1f} s",
        f"the last of them runs again after {killing.handed_on_s:.1f} s: what was running runs again in small groups",
        f"answered: {len(second.vectors)} of {len(first.vectors)}   answered twice: {demo.doubled}   left over: {left}",
        f"dead letters: {view.dead_letters}   largest difference to the first pass: {difference:.1e}",
    )
    out.print("\n".join(f"  {line}" for line in seen))
    whole = len(second.vectors) == len(first.vectors) and not (left or view.dead_letters or demo.doubled)
    return whole and difference < CLOSE


@dataclass(frozen=True)
class Reference:
    """The same model without a queue, in this process. Texts a second."""

    one_at_a_time: float
    encode_all: float
    difference: float


def reference(weights: Path, texts: list[str], vectors: Vectors) -> Reference:
    """Measure SentenceTransformer on the same texts while the workers are idle."""
    os.environ.update(NO_BARS)
    from sentence_transformers import SentenceTransformer

    out.print("\nmeasuring the same model without a queue ...")
    model = SentenceTransformer(str(weights), device="cpu")
    model.encode(texts[:8], show_progress_bar=False)
    began = time.monotonic()
    for text in texts[:SAMPLE]:
        model.encode(text, show_progress_bar=False)
    one_s = time.monotonic() - began
    began = time.monotonic()
    encoded = model.encode(texts, show_progress_bar=False)
    all_s = time.monotonic() - began
    difference = float(np.abs(np.asarray(vectors) - encoded).max())
    return Reference(min(SAMPLE, len(texts)) / one_s, len(texts) / all_s, difference)


def report_speed(counted: ServiceView, run: Pass, beside: Reference) -> None:
    """The first pass beside the references, in one table."""
    rate = len(run.vectors) / run.seconds
    table = Table("", "texts/s", "ratio", box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_row("through the queue, first pass", f"{rate:.0f}", "1.00")
    table.add_row("SentenceTransformer.encode(all)", f"{beside.encode_all:.0f}", f"{beside.encode_all / rate:.2f}")
    table.add_row(f"one text at a time ({SAMPLE})", f"{beside.one_at_a_time:.0f}", f"{beside.one_at_a_time / rate:.2f}")
    out.print(table)
    fill, padding = counted.rows_per_forward or 0, counted.padding or 0
    out.print(f"batches: {fill:.1f} texts a forward; {padding:.2f} tokens computed for each real one")
    out.print(f"largest difference to encode(all): {beside.difference:.1e}")


def look(url: str, service: str = SERVICE) -> None:
    """How to see the queues: our command, and redis-cli."""
    out.print("\n$ millstream queue ls")
    sys.stdout.flush()
    subprocess.run([str(COMMAND), "queue", "ls", "--url", url], check=True)
    socket = url.removeprefix("unix://")
    out.print("\nor, where redis-cli is installed:", soft_wrap=True)
    out.print(f"  redis-cli -s {socket} --raw XRANGE 'ms:{{{service}}}:q:normal' - + COUNT 1", soft_wrap=True)


def paragraphs() -> list[Paragraph]:
    """Every paragraph of pydoc's topics, each text once."""
    first_topic: dict[str, str] = {}
    for topic, text in topics.items():
        for paragraph in re.split(r"\n\s*\n", text):
            if len(paragraph.strip()) >= LEAST_PARAGRAPH:
                first_topic.setdefault(paragraph.strip(), topic)
    return [Paragraph(topic, text) for text, topic in first_topic.items()]


@contextmanager
def millstream_up(data_dir: Path, config: Path = CONFIG, log: IO[bytes] | None = None) -> Iterator[str]:
    """`millstream up` in the background; the URL of its server. Ends it, and with it all it started.

    `log` gets its messages and those of its workers; without it they go to standard error.
    """
    # No variable of the caller's may point it at another server or change the configuration shown.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MILLSTREAM_")} | NO_BARS
    up: subprocess.Popen[bytes] | None = None
    try:
        # In a session of its own: Ctrl-C reaches this script alone, which then ends everything in order. The pipe ends
        # with this script, also where it is killed, and with it all that runs.
        up = subprocess.Popen(
            [str(COMMAND), "up", str(config), "--data-dir", str(data_dir), "--until-eof"],
            env=environ,
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        yield wait_for(lambda: running(data_dir), up)
    finally:
        if up is not None:
            up.communicate()


def wait_for(condition: Callable[[], T | None], up: subprocess.Popen[bytes] | None = None) -> T:
    """Until `condition()` gives something, and that. Ends the demo where `millstream up` ended or nothing came."""
    deadline = time.monotonic() + START_S
    while not (found := condition()):
        if (up is not None and up.poll() is not None) or time.monotonic() > deadline:
            sys.exit("demo: the workers did not come up; see the messages above")
        time.sleep(0.02)
    return found


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except MillstreamError as error:
        sys.exit(f"demo: {error}")
