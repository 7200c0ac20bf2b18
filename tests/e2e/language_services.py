"""Services of type llm over tiny random models, with workers that tests kill, drain and fill."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from configs import USERS_FILE
from e2e.hosts import Host
from e2e.sites import Site, site_of
from e2e.supervisors import supervising
from support import eventually

from millstream.broker.config.load import ModelSpec, Runtime, ServiceSpec, load
from millstream.client import Client, Generated, GenerateStream
from millstream.worker.supervision.plan import Plan

CONTEXT = 4_096
"""Tokens of the models' context."""

LAYERS, USERS_LAYERS = 8, 24
"""Layers of the models: texts must not end before a test has done to them what it wants. The longest text of `users`
takes longer than 2 s on any machine.
"""

SLOTS = 4

SMALL_CACHE = 384
"""Tokens of the cache of the service `small`."""

USERS_YAML = "users.yaml"


@dataclass
class Services:
    """`chat`: two hosts with a worker each. `small`: a cache of SMALL_CACHE tokens, a model without a chat template.

    `users`: the llm service of USERS_FILE, in one worker process with `small`. `users_file` is that file.
    """

    chat: Site
    small: Site
    users: Site
    users_file: Path

    def await_both(self) -> None:
        """Waits until two workers of `chat` are ready, and no job of it is left from another test."""
        eventually(lambda: len(self.chat.watch.live()) >= 2 and not self.chat.watch.depth(), within_s=90.0)


@contextmanager
def language_services(url: str, home: Path) -> Iterator[Services]:
    """Starts all services at once. Yields when their workers are ready."""
    # Torch takes seconds to import; most tests need none.
    import language_models
    import torch

    folder = language_models.save_language_model(
        home / "model", "grouped", torch.float32, context=CONTEXT, num_hidden_layers=LAYERS
    )
    slow = language_models.save_language_model(
        home / "slow", "grouped", torch.float32, context=CONTEXT, num_hidden_layers=USERS_LAYERS
    )
    plain = Path(shutil.copytree(folder, home / "plain"))
    (plain / "chat_template.jinja").unlink()
    with ExitStack() as ends:
        chat, small, users = (
            ends.enter_context(site_of(url, spec, home / spec.name))
            for spec in (
                _spec("chat", folder, batch_size=SLOTS, max_batch_tokens=SLOTS * CONTEXT),
                _spec("small", plain, batch_size=8, max_batch_tokens=SMALL_CACHE),
                users_service(home, slow),
            )
        )
        for _ in range(2):
            chat.start_host(1)
        ends.enter_context(supervising(url, Plan(small.spec, 1, beside=[users.spec])))
        chat.await_workers(2)
        small.await_workers(1)
        users.await_workers(1)
        yield Services(chat, small, users, home / USERS_YAML)


def _spec(name: str, folder: Path, **runtime: object) -> ServiceSpec:
    model = ModelSpec(type="llm", model_name=str(folder), device="cpu")
    return ServiceSpec(name=name, model=model, model_ref=name, runtime=Runtime.model_validate(runtime))


def users_service(home: Path, folder: Path) -> ServiceSpec:
    """The llm service of USERS_FILE as it stands there, with `folder` as its model."""
    file = home / USERS_YAML
    file.write_text(USERS_FILE.replace('"SmolLM2-135M"', f'"{folder}"'))
    return load(file, {}).services["llm_service"]


class Reading(threading.Thread):
    """Reads a stream to its end. `deltas`: each text, and when it came in monotonic seconds."""

    def __init__(self, stream: GenerateStream) -> None:
        super().__init__()
        self._stream = stream
        self.deltas: list[tuple[float, str]] = []
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            for delta in self._stream:
                self.deltas.append((time.monotonic(), delta.text))
        except BaseException as error:  # noqa: BLE001 - the test reports it
            self.error = error

    def await_deltas(self, count: int) -> None:
        """Waits until so many deltas came; fails if the text ends before."""
        eventually(lambda: len(self.deltas) >= count or not self.is_alive(), within_s=60.0)
        assert self.is_alive(), f"the text ended after {len(self.deltas)} of {count} deltas: {self.error}"

    def text(self, within_s: float = 60.0) -> str:
        """Waits for the end. Returns the whole text; fails if the deltas are not the text of the result."""
        self.join(within_s)
        assert not self.is_alive()
        if self.error:
            raise self.error
        joined, generated = "".join(text for _, text in self.deltas), self._stream.generated
        assert generated
        assert joined == generated.text == self._stream.text
        return joined

    @property
    def reason(self) -> str | None:
        """The finish reason, if the text is complete."""
        return self._stream.generated.finish_reason if self._stream.generated else None

    @property
    def seed(self) -> int | None:
        """The seed that the text was sampled with, if it is complete."""
        return self._stream.generated.seed if self._stream.generated else None

    def longest_pause_s(self, since: float) -> float:
        """Longest time between two deltas after `since`, monotonic seconds."""
        return max(after - before for before, after in pairwise([since, *(at for at, _ in self.deltas if at > since)]))


class Calls:
    """Calls of one service. `options` are those of all its texts."""

    def __init__(self, client: Client, site: Site, **options: Any) -> None:
        self._client = client
        self._named = {"service": site.spec.name, **options}

    def generate(self, prompt: Any, **options: Any) -> Generated:
        found = self._client.generate(prompt, **{**self._named, **options})
        assert isinstance(found, Generated)
        return found

    def stream(self, prompt: Any, **options: Any) -> GenerateStream:
        return self._client.generate_stream(prompt, **{**self._named, **options})

    def chat(self, messages: Any, **options: Any) -> Generated:
        return self._client.chat(messages, **{**self._named, **options})

    def read(self, prompt: Any, **options: Any) -> Reading:
        return Reading(self.stream(prompt, **options))


def holders(site: Site) -> dict[str, int]:
    """The workers that hold jobs: consumer -> pid."""
    return {consumer: pid for consumer, pid in site.watch.live().items() if site.watch.held(consumer)}


def kill_holder(site: Site) -> int:
    """Kills a worker that holds jobs, with SIGKILL. Returns its pid."""
    pid = next(iter(holders(site).values()))
    os.kill(pid, signal.SIGKILL)
    return pid


def host_of(site: Site, pid: int) -> Host:
    return next(host for host in site.hosts if pid in host.children)


def nothing_left(site: Site) -> Callable[[], bool]:
    """Tells whether no job and no text of one is left on the server."""
    return lambda: not site.connection.client.keys(site.keys.partial("*")) and not site.watch.depth()
