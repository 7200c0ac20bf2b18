"""A language model for tests, without torch: prompt_echo.py runs a worker of it in a process of its own.

It generates the text of its prompt word by word; of a conversation, the number of messages and the last one's text.
Each word counts as a token.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import cast

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.errors import InvalidRequest, MillstreamError
from millstream.broker.contract.generation import Generation, Usage
from millstream.broker.contract.job import Json
from millstream.broker.contract.prompt import Prompt
from millstream.worker.engines.base import Step
from millstream.worker.models.base import Prepared
from millstream.worker.models.echo_stream import EchoStreamEngine, EchoStreamModel, Speech
from millstream.worker.process import Worker
from millstream.worker.scheduling.active_job import Outcome, Rows
from millstream.worker.scheduling.batcher import Row
from millstream.worker.shutdown import Relay
from millstream.worker.supervision.child_args import ChildArgs, Hosted, new_consumer
from millstream.worker.supervision.progress import Progress

SEED = 5


class PromptEcho(EchoStreamModel):
    """Generates the words of its prompt."""

    op = "generate"

    def _row(self, value: Json, limit: int) -> Prepared | MillstreamError:
        try:
            return super()._row(text_of(Prompt.read(value)), limit)
        except InvalidRequest as error:
            return error

    def start_engine(self) -> EchoStreamEngine:
        return PromptEchoEngine(self._habits, self._slots)


class PromptEchoEngine(EchoStreamEngine):
    """Engine whose results have a usage and a seed."""

    def step(self) -> Step:
        step = super().step()
        outcomes = [counted(row, outcome) for row, outcome in zip(step.rows, step.outcomes, strict=True)]
        return step._replace(outcomes=outcomes)

    def conclude(self, rows: Rows, reason: str) -> Sequence[Outcome]:
        return [counted(row, outcome) for row, outcome in zip(rows, super().conclude(rows, reason), strict=True)]


def text_of(prompt: Prompt) -> str:
    if prompt.messages is not None:
        return f"{len(prompt.messages)} {prompt.messages[-1]['content']}"
    return prompt.text if prompt.text is not None else " ".join(map(str, prompt.token_ids or ()))


def counted(row: Row[Prepared], outcome: Outcome) -> Outcome:
    if isinstance(outcome, MillstreamError):
        return outcome
    text = Generation.read(cast(Json, outcome))
    speech = cast(Speech, row.payload.features)
    return text._replace(usage=Usage(len(speech.words), speech.said), seed=SEED).json()


def main(url: str, service: str) -> None:
    """Works for `service` until SIGTERM."""
    progress = Progress.create()

    def load(spec: ServiceSpec) -> PromptEcho:
        return PromptEcho(spec.model.model_name, spec.runtime.batch_size)

    args = ChildArgs([Hosted(service, progress.fd)], "ms", new_consumer(), None, 1, supervised=False)
    worker = Worker(args, url, load)
    relay = Relay(worker.drain)
    signal.signal(signal.SIGTERM, lambda *_: relay.ring())
    sys.exit(worker.run())


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(*sys.argv[1:])
