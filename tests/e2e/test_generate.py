"""`millstream generate` and `millstream chat` with a worker in another process, and many streams of one client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from e2e.cli_support import COMMAND, Shell, environment
from e2e.conftest import Supervised
from e2e.sites import Site, echo_stream, site_of
from e2e.terminal import CTRL_C, CTRL_D, Terminal
from support import eventually

from millstream.broker.config.load import ModelSpec, Runtime, ServiceSpec
from millstream.client import AsyncClient, AsyncGenerateStream, Client, Generated

TESTS = Path(__file__).parents[1]
SLOW = " ".join(f"word{number}" for number in range(1_000))


@contextmanager
def prompt_echo(url: str, home: Path, habits: str = "") -> Iterator[Site]:
    """A service of type llm with one worker of tests/prompt_echo.py, which is ready."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    model = ModelSpec(type="llm", model_name=f"echo,{habits}")
    runtime = Runtime.model_validate({"batch_size": 8})
    with site_of(url, ServiceSpec(name=name, model=model, model_ref="m", runtime=runtime), home / name) as site:
        command = [sys.executable, str(TESTS / "prompt_echo.py"), url, name]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            site.await_workers(1)
            yield site
        finally:
            process.terminate()
            try:
                process.wait(20.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            site.connection.client.srem("ms:services", name)


@pytest.fixture(scope="module")
def llm(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with prompt_echo(url, tmp_path_factory.mktemp("llm"), "sleep:0.005") as site:
        yield site


@pytest.fixture
def shell(tmp_path: Path, url: str) -> Shell:
    return Shell(tmp_path, url)


# -- the clients ---------------------------------------------------------------------------------------------------


def test_texts_and_conversations_are_generated(llm: Site) -> None:
    with Client(llm.url) as client:
        text = client.generate("the mill turns", service=llm.spec.name, max_tokens=2)
        texts = client.generate(["a b", "c"], service=llm.spec.name)
        answer = client.chat([{"role": "user", "content": "hello mill"}], service=llm.spec.name)
        with client.chat_stream([{"role": "user", "content": "hello mill"}], service=llm.spec.name) as stream:
            deltas = list(stream)

    assert (text.text, text.finish_reason, text.seed) == ("the mill ", "length", 5)
    assert text.usage == {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 0}
    assert text.version == f"echo-stream:{llm.spec.model.model_name}"
    assert [each.text for each in texts] == ["a b", "c"]
    assert answer.text == "".join(delta.text for delta in deltas) == "1 hello mill"
    assert (deltas[-1].finish_reason, deltas[-1].usage) == ("stop", answer.usage)


def test_a_call_with_many_prompts_fills_a_worker(url: str, tmp_path: Path) -> None:
    with prompt_echo(url, tmp_path, "sleep:0.05") as site, Client(url) as client:
        texts = client.generate([f"{number} a b c d e f g h" for number in range(32)], service=site.spec.name)

    assert [each.text.split()[0] for each in texts] == [str(number) for number in range(32)]


STREAMS, UNREAD, WORDS = 40, 4, 600


def kill_holder(site: Site) -> None:
    """Kills a worker that runs texts, amid them."""
    eventually(lambda: site.connection.client.keys(site.keys.partial("*")))
    pid = next(pid for consumer, pid in site.watch.live().items() if site.watch.held(consumer))
    os.kill(pid, signal.SIGKILL)


def test_streams_that_nobody_reads_and_a_killed_worker_do_not_affect_other_calls(supervised: Supervised) -> None:
    site = supervised(echo_stream("sleep:0.002", batch_size=STREAMS + 2, max_batch_tokens=10**6), 2)
    texts = [" ".join(f"{number}.{word}" for word in range(WORDS)) for number in range(STREAMS)]

    async def read(stream: AsyncGenerateStream) -> tuple[str, Generated | None]:
        text = "".join([delta.text async for delta in stream])
        return text, stream.generated

    async def run() -> tuple[list[tuple[str, Generated | None]], list[str]]:
        async with AsyncClient(site.url) as client:
            streams = [client.generate_stream(text, service=site.spec.name) for text in texts]
            for stream in streams[:UNREAD]:
                await stream.__aenter__()
            reading = asyncio.gather(*map(read, streams[UNREAD:]))
            killing = asyncio.create_task(asyncio.to_thread(kill_holder, site))
            short: list[str] = []
            while not (reading.done() and killing.done()):
                short.append((await client.generate(f"call {len(short)}", service=site.spec.name)).text)
            await killing
            # Read last, when all has arrived.
            return [*[await read(stream) for stream in streams[:UNREAD]], *await reading], short

    found, short = asyncio.run(run())

    assert [text for text, _ in found] == texts
    assert {generated.finish_reason if generated else None for _, generated in found} == {"stop"}
    assert short == [f"call {number}" for number in range(len(short))]
    assert not site.connection.client.keys(site.keys.partial("*"))


# -- millstream generate -------------------------------------------------------------------------------------------


def test_the_command_prints_the_text_and_says_what_it_took(shell: Shell, llm: Site) -> None:
    words = ["generate", "--service", llm.spec.name]
    plain = shell.run(*words, "the mill", "--max-tokens", "1", "-v")
    piped = shell.run(*words, "-", stdin="wäter\n".encode())
    without = shell.run(*words, stdin=b"no dash")
    whole = shell.run(*words, "the mill", "--json", "--seed", "3", "--stop", "a", "--stop", "b")

    assert (plain.code, plain.out) == (0, b"the \n")
    assert plain.err.startswith("millstream: length, 2 prompt tokens, 1 completion tokens, 0 cached tokens, seed 5, ")
    assert (piped.code, piped.out.decode(), piped.err) == (0, "wäter\n", "")
    assert without.out == b"no dash\n"
    found = json.loads(whole.out)
    assert (found["text"], found["finish_reason"], found["usage"]["completion_tokens"]) == ("the mill", "stop", 2)
    assert whole.err == ""


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["", "--json"], 2, "an empty prompt"),
        (["a", "--temperature", "nan"], 2, "temperature="),
        (["a", "--top-p", "0"], 2, "top_p="),
        (["a", "--stop", ""], 2, "stop="),
        (["a", "--json-schema", "config.yaml"], 2, "is not JSON"),
        (["a", "--service", "nowhere"], 4, "nowhere"),
    ],
)
def test_what_is_wrong_is_one_line(shell: Shell, llm: Site, words: list[str], code: int, message: str) -> None:
    (shell.home / "config.yaml").write_text("models: [\n")
    ended = shell.run("generate", "--service", llm.spec.name, *words)

    assert message in ended.line(code)


def test_a_text_that_is_not_utf_8_is_refused(shell: Shell, llm: Site) -> None:
    ended = shell.run("generate", "--service", llm.spec.name, "-", stdin=b"a \xff b")

    assert "JSON" in ended.line(2)


def test_a_service_of_another_type_is_named(shell: Shell, llm: Site, supervised: Supervised) -> None:
    from e2e.sites import echo

    site = supervised(echo(""), 1)

    assert "is of type 'echo' (it cannot generate)" in shell.run("generate", "a", "--service", site.spec.name).line(2)
    assert "it cannot embed" in shell.run("embed", "a", "--service", llm.spec.name).line(2)


def test_a_closed_pipe_and_ctrl_c_cancel_the_job(shell: Shell, llm: Site) -> None:
    words = [str(COMMAND), "generate", SLOW, "--service", llm.spec.name]
    env = environment(shell.home, shell.url)
    with subprocess.Popen(words, env=env, cwd=shell.home, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.read(5) == b"word0"
        process.stdout.close()
        said = process.stderr.read()
        process.wait(20.0)
    with subprocess.Popen(words, env=env, cwd=shell.home, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.read(5) == b"word0"
        process.send_signal(signal.SIGINT)
        rest, interrupted = process.communicate(timeout=20.0)

    assert (said, interrupted, process.returncode) == (b"", b"", 130)
    assert rest.endswith(b"\n")
    assert b"word999" not in rest
    eventually(lambda: not llm.connection.client.keys(llm.keys.partial("*")))


# -- millstream chat -----------------------------------------------------------------------------------------------


def test_a_piped_conversation_is_answered_line_by_line(shell: Shell, llm: Site) -> None:
    words = ["chat", "--service", llm.spec.name, "--system", "Be brief."]

    ended = shell.run(*words, stdin=b"hello mill\n\nagain\r\n/reset\nnew")

    # The number of messages that the model got, then the last one.
    assert (ended.code, ended.out.decode().splitlines(), ended.err) == (0, ["2 hello mill", "4 again", "2 new"], "")


def test_an_error_ends_a_piped_conversation_with_its_status(shell: Shell, llm: Site) -> None:
    ended = shell.run("chat", "--service", llm.spec.name, stdin=b"good\nbad \xff\nnever\n")

    assert (ended.code, ended.out) == (2, b"1 good\n")
    assert len(ended.err.splitlines()) == 1


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(shell: Shell, llm: Site) -> None:
    with Terminal(shell, ["chat", "--service", llm.spec.name]) as terminal:
        terminal.shows("> ")
        terminal.press(b"hello mill\n")
        terminal.shows("1 hello mill\n> ")
        terminal.press(SLOW[:3_000].encode() + b"\n")
        terminal.shows("3 word0 word1 ")
        terminal.press(CTRL_C)
        terminal.shows("> ", 3)
        eventually(lambda: not llm.connection.client.keys(llm.keys.partial("*")))
        terminal.press(b"again\n")
        terminal.shows("5 again\n> ")
        terminal.press(CTRL_C)
        terminal.shows("> ", 5)
        terminal.press(b"bad \xff\n")
        terminal.shows("millstream: ")
        terminal.press(b"/reset\nnew\n")
        terminal.shows("1 new\n> ")
        terminal.press(CTRL_D)

        assert terminal.wait() == 0
        assert "Traceback" not in terminal.shown


def test_a_text_moves_no_cursor(shell: Shell, llm: Site) -> None:
    with Terminal(shell, ["generate", "--service", llm.spec.name, "a \x1b[2J\x07b"]) as terminal:
        assert terminal.wait() == 0
        assert terminal.shown == "a \\x1b[2J\\x07b\n"


def test_help_needs_no_client(shell: Shell) -> None:
    program = "import sys, millstream.cli.main; print('millstream.client' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)

    assert done.stdout.split() == ["False", "False"]
