"""Text generation as a whole: real worker processes of type llm, tiny random models, and all that befalls a text."""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from e2e.cli_support import Shell
from e2e.language_services import (
    CONTEXT,
    SLOTS,
    SMALL_CACHE,
    Calls,
    Reading,
    Services,
    holders,
    host_of,
    kill_holder,
    language_services,
    nothing_left,
)
from e2e.text_cases import ANSWERS, PROMPT, REFUSALS, SCHEMA, user
from e2e.text_lives import ENDS, Lives
from support import eventually

from millstream.broker.contract.errors import DeadlineExceeded, InvalidRequest
from millstream.client import Client, Generated

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300)]

LONG = bool(os.environ.get("MILLSTREAM_LONG"))
KILLS = 30 if LONG else 1
LIVES = 2_000 if LONG else 200
OPTIONS: dict[str, dict[str, Any]] = {
    "sampled": {"temperature": 1.0, "top_p": 0.95, "seed": 7, "max_tokens": 500, "ignore_eos": True},
    "greedy": {"temperature": 0, "max_tokens": 500, "ignore_eos": True},
    "penalised": {
        **{"temperature": 0.9, "top_k": 50, "min_p": 0.01, "seed": 8, "stop": "never said", "logit_bias": {300: 1.5}},
        **{"repetition_penalty": 1.1, "frequency_penalty": 0.2, "max_tokens": 500, "ignore_eos": True},
    },
    "form": {
        **{"temperature": 1.0, "seed": 9, "logprobs": 2, "max_tokens": 500},
        "response_format": {"type": "regex", "pattern": "([a-z]{2,9} ){1000}"},
    },
}
LONGER: dict[str, Any] = {"max_tokens": 2_000}

NEIGHBOUR: dict[str, Any] = {"temperature": 0.8, "seed": 3, "max_tokens": 100, "ignore_eos": True}


@pytest.fixture(scope="module")
def services(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    with language_services(url, tmp_path_factory.mktemp("llm")) as running:
        yield running


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


@pytest.fixture(scope="module")
def calls(client: Client, services: Services) -> Calls:
    return Calls(client, services.chat)


@pytest.fixture(scope="module")
def undisturbed(calls: Calls) -> Callable[[str], str]:
    """Tells the text of OPTIONS[kind], generated alone."""
    return cache(lambda kind: calls.generate(PROMPT, **OPTIONS[kind]).text)


@pytest.fixture(scope="module")
def expected(undisturbed: Callable[[str], str]) -> dict[str, str]:
    """The text of each kind, generated alone."""
    return {kind: undisturbed(kind) for kind in OPTIONS}


def all_kinds(calls: Calls, **options: Any) -> dict[str, Reading]:
    """Begins a text of each kind at the same time."""
    return {kind: calls.read(PROMPT, **OPTIONS[kind], **options) for kind in OPTIONS}


@pytest.fixture
def shell(services: Services, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(tmp_path_factory.mktemp("shell"), services.chat.url)


# -- a text survives -----------------------------------------------------------------------------------------------


def test_a_greedy_text_is_that_of_transformers(services: Services, undisturbed: Callable[[str], str]) -> None:
    from language_models import load_reference, reference_text
    from transformers import AutoTokenizer

    folder = Path(services.chat.spec.model.model_name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(PROMPT)["input_ids"]
    ids = reference_text(load_reference(folder), prompt, 200, eos_token_id=None)
    text = str(tokenizer.decode([*prompt, *ids])).removeprefix(PROMPT)

    assert undisturbed("greedy").startswith(text.rstrip("�"))


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_worker_changes_no_text(
    services: Services, calls: Calls, expected: dict[str, str], number: int
) -> None:
    services.await_both()
    chance = random.Random()
    readings = all_kinds(calls)
    # Its seed is that of its job, which its next worker must find again.
    unseeded = calls.read(PROMPT, **NEIGHBOUR | {"seed": None, "max_tokens": 500})
    kind, delta = chance.choice(list(readings)), chance.randrange(1, 15)
    readings[kind].await_deltas(delta)
    kill_holder(services.chat)

    assert {kind: reading.text() for kind, reading in readings.items()} == expected, f"killed at {delta} of {kind}"
    text = unseeded.text()
    assert calls.generate(PROMPT, **NEIGHBOUR | {"seed": unseeded.seed, "max_tokens": 500}).text == text
    eventually(nothing_left(services.chat))
    assert not services.chat.watch.dead_letters()


def test_realtime_texts_that_take_the_slots_change_no_text(
    services: Services, client: Client, calls: Calls, expected: dict[str, str]
) -> None:
    services.await_both()
    readings = all_kinds(calls, priority="batch")
    for reading in readings.values():
        reading.await_deltas(3)
    since = time.monotonic()
    urgent = client.generate(
        [f"{PROMPT} {number}" for number in range(4 * SLOTS)],
        service=services.chat.spec.name,
        priority="realtime",
        max_tokens=600,
        ignore_eos=True,
    )

    assert [each.finish_reason for each in urgent] == ["length"] * (4 * SLOTS)
    assert {kind: reading.text() for kind, reading in readings.items()} == expected
    # At least one had to wait: all slots were taken.
    assert max(reading.longest_pause_s(since) for reading in readings.values()) > 0.15
    eventually(nothing_left(services.chat))


def test_a_drain_moves_texts_to_another_worker_within_a_second(services: Services, calls: Calls) -> None:
    # So long that no text ends before the drain looks for another worker.
    expected = {kind: calls.generate(PROMPT, **OPTIONS[kind] | LONGER).text for kind in OPTIONS}
    services.await_both()
    readings = {kind: calls.read(PROMPT, **OPTIONS[kind] | LONGER) for kind in OPTIONS}
    for reading in readings.values():
        reading.await_deltas(2)
    host = host_of(services.chat, next(iter(holders(services.chat).values())))
    since = time.monotonic()
    host.terminate()

    assert host.wait(20.0) == 0
    services.chat.start_host(1)
    assert {kind: reading.text() for kind, reading in readings.items()} == expected
    assert max(reading.longest_pause_s(since) for reading in readings.values()) < 1.0
    assert "handed over" in host.log
    eventually(nothing_left(services.chat))


# -- what callers see ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def neighbours_text(calls: Calls) -> str:
    return calls.generate(PROMPT, **NEIGHBOUR).text


@pytest.fixture
def neighbour(services: Services, calls: Calls, neighbours_text: str) -> Iterator[None]:
    """A stream that runs meanwhile, and ends with the text that it has alone."""
    reading = calls.read(PROMPT, **NEIGHBOUR)
    yield
    assert reading.text() == neighbours_text
    eventually(nothing_left(services.chat))


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("case", REFUSALS)
def test_a_call_that_cannot_be_run_is_refused_with_its_reason(calls: Calls, case: str) -> None:
    call, error, message = REFUSALS[case]

    with pytest.raises(error, match=re.compile(message, re.DOTALL)) as caught:
        call(calls)

    assert type(caught.value) is error


@pytest.mark.usefixtures("neighbour")
def test_without_a_chat_template_messages_are_refused_and_prompts_run(client: Client, services: Services) -> None:
    small = Calls(client, services.small, max_tokens=5)

    with pytest.raises(InvalidRequest, match="no chat template"):
        small.chat(user("a"))
    assert small.generate("a").usage["completion_tokens"] == 5


@pytest.mark.usefixtures("neighbour")
def test_the_last_token_of_the_context_can_be_generated(calls: Calls) -> None:
    got = calls.generate([5] * (CONTEXT - 1), ignore_eos=True)

    assert (got.finish_reason, got.usage["completion_tokens"]) == ("length", 1)


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("case", ANSWERS)
def test_a_call_gets_the_text_that_its_options_ask_for(calls: Calls, case: str) -> None:
    ANSWERS[case](calls)


@pytest.mark.usefixtures("neighbour")
def test_a_slow_reader_gets_the_rest_after_the_job_is_over(calls: Calls, services: Services) -> None:
    options = NEIGHBOUR | {"max_tokens": 300}
    whole = calls.generate(PROMPT, **options).text
    with calls.stream(PROMPT, **options) as stream:
        first = next(stream)
        eventually(lambda: not services.chat.watch.depth(), within_s=30.0)
        rest = list(stream)

    assert "".join(delta.text for delta in [first, *rest]) == whole
    assert rest[-1].finish_reason == "length"


# -- limits --------------------------------------------------------------------------------------------------------


def test_texts_that_the_cache_cannot_hold_together_are_the_same(
    client: Client, calls: Calls, services: Services
) -> None:
    options: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True}
    prompts = [f"{number}: {PROMPT} {'of the valley ' * number}" for number in range(8)]
    expected = [each.text for each in client.generate(prompts, service=services.chat.spec.name, seed=1, **options)]
    found: list[Generated] = client.generate(prompts, service=services.small.spec.name, seed=1, **options)

    assert [each.text for each in found] == expected
    assert sum(sum(each.usage.values()) for each in found) > 4 * SMALL_CACHE
    with pytest.raises(InvalidRequest, match=f"the cache holds {SMALL_CACHE} of prompt and text"):
        Calls(client, services.small).generate([5] * SMALL_CACHE)
    assert Calls(client, services.small).generate([5] * (SMALL_CACHE - 1), ignore_eos=True).finish_reason == "length"
    eventually(nothing_left(services.small))


def test_the_users_limits_cut_a_text_after_two_seconds_and_give_what_there_is(
    client: Client, services: Services, shell: Shell
) -> None:
    checked = shell.run("config", "check", str(services.users_file))
    assert checked.code == 0
    assert "warning: batch_timeout has no effect on type llm: texts join at every step" in checked.err
    runtime = services.users.spec.runtime
    users = Calls(client, services.users, ignore_eos=True)
    assert (runtime.batch_size, runtime.batch_timeout, runtime.inference_timeout) == (4, 0.05, 2.0)
    # It reads the service and connects: what that takes is not the calls'.
    assert users.generate("a", max_tokens=1).finish_reason == "length"
    time.sleep(0.2)

    began = time.monotonic()
    readings = [users.read(f"{PROMPT} {number}") for number in range(runtime.batch_size)]
    for reading in readings:
        reading.await_deltas(1)
    with pytest.raises(DeadlineExceeded) as caught:
        users.generate("a", max_tokens=1)
    texts = [reading.text() for reading in readings]
    took_s = time.monotonic() - began

    assert caught.value.phase == "queue"
    assert [reading.reason for reading in readings] == ["deadline"] * runtime.batch_size
    assert all(texts)
    assert 1.9 < took_s < 3.0
    eventually(nothing_left(services.users))


def test_slots_blocks_and_texts_on_the_server_are_all_returned_over_many_lives(
    services: Services, calls: Calls, client: Client
) -> None:
    services.await_both()
    small = Calls(client, services.small, ignore_eos=True)
    workers = [site.watch.live() for site in (services.chat, services.small)]
    lives = Lives(services.chat.url, random.Random(21))

    ends = lives.run([(services.chat.spec.name, CONTEXT), (services.small.spec.name, SMALL_CACHE)], LIVES)

    assert ends.keys() == set(ENDS)
    assert ends.total() == LIVES
    for site in (services.chat, services.small):
        eventually(nothing_left(site))
    assert workers == [site.watch.live() for site in (services.chat, services.small)]
    # All blocks: this text needs each of them.
    assert small.generate([5] * (SMALL_CACHE - 1)).finish_reason == "length"
    # All slots: each worker prepares one text more than it has slots for.
    readings = [calls.read(f"{PROMPT} {number}", ignore_eos=True, max_tokens=500) for number in range(2 * SLOTS + 2)]
    eventually(lambda: sum(bool(reading.deltas) for reading in readings) >= 2 * SLOTS)
    assert all(reading.is_alive() for reading in readings)
    assert all(reading.text() for reading in readings)
    eventually(nothing_left(services.chat))


# -- commands ------------------------------------------------------------------------------------------------------


def test_the_commands_show_what_the_client_gets(shell: Shell, calls: Calls, services: Services) -> None:
    name = services.chat.spec.name
    (shell.home / "schema.json").write_text(json.dumps(SCHEMA))
    words = ["--service", name, "--max-tokens", "40", "--temperature", "1", "--seed", "5"]
    options: dict[str, Any] = {"max_tokens": 40, "temperature": 1.0, "seed": 5}
    run: Callable[..., Any] = shell.run
    jobs = {
        "text": partial(run, "generate", PROMPT, *words, "--json"),
        "chat": partial(run, "chat", "--system", "Be brief.", *words, "-v", stdin=b"hello\n"),
        "schema": partial(run, "generate", "a", "--service", name, "--json-schema", "schema.json"),
        "long": partial(run, "generate", "the mill " * CONTEXT, "--service", name),
        "templateless": partial(run, "chat", "--service", services.small.spec.name, stdin=b"hello\n"),
    }
    ended: dict[str, Any] = {}
    threads = [threading.Thread(target=lambda each=each: ended.update({each: jobs[each]()})) for each in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    shown = json.loads(ended["text"].out)
    assert (shown["text"], shown["seed"]) == (calls.generate(PROMPT, **options).text, 5)
    messages = [{"role": "system", "content": "Be brief."}, *user("hello")]
    chatted = calls.chat(messages, **options)
    assert ended["chat"].code == 0
    assert f"{chatted.usage['completion_tokens']} completion tokens" in ended["chat"].err
    assert json.loads(ended["schema"].out).keys() == {"mill", "wheels", "name"}
    assert f"prompt and text together have at most {CONTEXT}" in ended["long"].line(2)
    assert "no chat template" in ended["templateless"].line(2)


def test_workers_log_no_warning_of_a_library(services: Services) -> None:
    logs = "".join(host.log for host in services.chat.hosts)

    assert "ready: " in logs
    assert "[transformers]" not in logs
    assert "Traceback" not in logs
