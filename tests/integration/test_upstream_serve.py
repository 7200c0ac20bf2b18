"""A real server in front of which the queue stands: `transformers serve`, with a random language model of two layers.

Runs if MILLSTREAM_LONG=1. MILLSTREAM_SERVE_PYTHON names the Python of an environment with transformers[serving] and
accelerate; by default it is the one that runs the tests.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from upstream_workers import pids, working

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.server.embedded import EmbeddedServer
from millstream.client import Client

pytestmark = pytest.mark.skipif(os.environ.get("MILLSTREAM_LONG") != "1", reason="MILLSTREAM_LONG is not 1")

START_S = 60.0


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


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """URL and model name of the server."""
    folder = tmp_path_factory.mktemp("llm")
    save_model(folder)
    port = free_port()
    python = os.environ.get("MILLSTREAM_SERVE_PYTHON", sys.executable)
    # Its output goes to a file: a pipe that nobody reads would stop it.
    with (folder / "serve.log").open("wb") as log:
        words = ["-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu", "--port", str(port)]
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        process = subprocess.Popen([python, *words], stdout=log, stderr=log, env=environ, start_new_session=True)
    url = f"http://localhost:{port}/v1"
    try:
        ends = time.monotonic() + START_S
        while not _answers(f"http://localhost:{port}/health"):
            assert process.poll() is None, (folder / "serve.log").read_text()[-2_000:]
            assert time.monotonic() < ends
            time.sleep(0.2)
        yield url, str(folder)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def made(name: str, serve: tuple[str, str]) -> ServiceSpec:
    url, folder = serve
    model = ModelSpec.model_validate({"type": "llm", "backend": "openai", "url": url, "model_name": folder})
    return ServiceSpec(name=name, model=model, model_ref="m", runtime=Runtime(total_timeout=100.0))


def test_texts_and_chats_stream_and_a_text_goes_on_after_its_worker_was_killed(
    server: EmbeddedServer, client: Client, service: str, serve: tuple[str, str]
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
    server: EmbeddedServer, client: Client, service: str, serve: tuple[str, str]
) -> None:
    with working(server.url, made(service, serve)):
        streams = [client.stream(service, f"the mill {n}", max_tokens=12, temperature=0.0) for n in range(20)]
        texts = ["".join(stream) for stream in streams]

        assert all(texts)
        assert {stream.finish_reason for stream in streams} <= {"length", "stop"}
