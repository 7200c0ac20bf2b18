"""Chat beside bulk generation on one worker: the time to a first token, what bulk loses, and whether its texts differ.

Bulk texts of priority batch fill all slots of the worker. Chats of priority realtime come at random times. Both are
measured alone and together, in turn. A bulk text that a chat displaced must be the text of the run without chats. That
is exact in float64, so the tiny model runs in it. In float32 a token may change if another is nearly as probable, since
the sums of a forward depend on its other texts: the real model's texts may differ as often as without chats.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import torch
from bench_generation import SMOLLM2
from corpus import SEED
from measure import Report, Rounds, Table, percentile
from stage import Stage
from tiny_llama import save_tiny_llama
from transformers import LlamaForCausalLM

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import MillstreamError
from millstream.client import AsyncClient
from scenario_lib.calls import ANSWERED, at_least, at_most, counted, name_of

SERVICE, SLOTS, ROUNDS = "chat", 16, 3
WORDS = ("the", "mill", "grinds", "corn", "wheat", "by", "day", "night", "river", "wheel", "stone", "flour", "bread")
CHAT_WORDS, BULK_WORDS = 12, 16

MOST_TTFT, LEAST_BULK = 2.0, 0.7
"""Time to the first token beside bulk over that without it, and rate of bulk beside chats over that without them."""


@dataclass(frozen=True, slots=True)
class Load:
    """`bulk` texts of `bulk_tokens` tokens; a chat of `chat_tokens` tokens every `every_s` seconds in the mean."""

    bulk: int
    bulk_tokens: int
    every_s: float
    chat_tokens: int


TINY = Load(bulk=128, bulk_tokens=256, every_s=0.3, chat_tokens=24)
REAL = Load(bulk=160, bulk_tokens=64, every_s=1.5, chat_tokens=12)


@dataclass
class Chats:
    """How chats ended. `first_s`: seconds from a call to its first delta."""

    first_s: list[float] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)


@dataclass
class Bulk:
    """`texts` in order; `rate`: tokens a second, from the first call to the last answer."""

    texts: Sequence[str]
    rate: float


def tiny(stage: Stage, seconds: float) -> Report:
    folder = save_tiny_llama(stage.home / "tiny-llama")
    LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).save_pretrained(folder)
    return _run(stage, seconds, TINY, str(folder), "auto")


def smollm2(stage: Stage, seconds: float) -> Report:
    return _run(stage, seconds, REAL, SMOLLM2, "float32")


def _run(stage: Stage, seconds: float, load: Load, model: str, dtype: str) -> Report:
    of = ModelSpec.model_validate({"type": "llm", "model_name": model, "device": "cpu", "dtype": dtype})
    runtime = {"batch_size": SLOTS, "max_batch_tokens": 16_384, "total_timeout": 600.0}
    spec = ServiceSpec(name=SERVICE, model=of, model_ref="m", runtime=Runtime.model_validate(runtime))
    stage.workers(spec, 1)
    return asyncio.run(_measure(stage.url, load, seconds))


async def _measure(url: str, load: Load, seconds: float) -> Report:
    """Each round measures bulk alone, chats alone, and both together. Chats alone take `seconds` in all."""
    rounds, alone, beside = Rounds(), Chats(), Chats()
    texts: Sequence[str] = ()
    async with AsyncClient(url) as client, AsyncClient(url) as other:
        await _chat(client, load, 0, Chats())
        for number in range(ROUNDS):
            undisturbed = await _bulk(other, load)
            await _chats(client, load, 2 * number, alone, asyncio.create_task(asyncio.sleep(seconds / ROUNDS)))
            bulk = asyncio.create_task(_bulk(other, load))
            await _chats(client, load, 2 * number + 1, beside, bulk)
            disturbed = await bulk
            rounds.add("alone", undisturbed.rate)
            rounds.add("beside", disturbed.rate)
            texts = texts or undisturbed.texts
            rounds.add("differ alone", _different(texts, undisturbed.texts))
            rounds.add("differ beside", _different(texts, disturbed.texts))
            # A run that is interrupted has shown its rounds.
            click.echo(
                f"round {number + 1}: bulk {undisturbed.rate:.1f} tokens/s alone, {disturbed.rate:.1f} beside chats; "
                f"first token, p99 of all: {_p99(alone):.3f} s alone, {_p99(beside):.3f} s beside bulk"
            )
    return _report(load, rounds, alone, beside)


def _p99(chats: Chats) -> float:
    return percentile(chats.first_s, 0.99)


def _different(ours: Sequence[str], theirs: Sequence[str]) -> int:
    return sum(one != other for one, other in zip(ours, theirs, strict=True))


async def _bulk(client: AsyncClient, load: Load) -> Bulk:
    """Generates all bulk texts."""
    chance = random.Random(SEED)
    prompts = [" ".join(chance.choices(WORDS, k=BULK_WORDS)) for _ in range(load.bulk)]
    began = time.perf_counter()

    async def one(number: int) -> str:
        # Every other text is greedy.
        temperature = float(number % 2 == 0)
        generated = await client.generate(
            prompts[number],
            service=SERVICE,
            priority="batch",
            timeout=600.0,
            max_tokens=load.bulk_tokens,
            temperature=temperature,
            seed=number,
            ignore_eos=True,
        )
        return generated.text

    texts = await asyncio.gather(*map(one, range(load.bulk)))
    return Bulk(texts, load.bulk * load.bulk_tokens / (time.perf_counter() - began))


async def _chats(client: AsyncClient, load: Load, seed: int, chats: Chats, ends: asyncio.Task[Any]) -> None:
    """Sends chats at random times until `ends` is done, and waits for their answers."""
    chance = random.Random(seed)
    calls = []
    while not ends.done():
        calls.append(asyncio.create_task(_chat(client, load, chance.randrange(10**6), chats)))
        await asyncio.wait([ends], timeout=chance.expovariate(1 / load.every_s))
    await asyncio.gather(*calls)


async def _chat(client: AsyncClient, load: Load, seed: int, chats: Chats) -> None:
    words = " ".join(random.Random(seed).choices(WORDS, k=CHAT_WORDS))
    stream = client.chat_stream(
        [{"role": "user", "content": words}],
        service=SERVICE,
        priority="realtime",
        max_tokens=load.chat_tokens,
        temperature=0.0,
        ignore_eos=True,
    )
    began, first = time.perf_counter(), False
    try:
        async for _ in stream:
            if not first:
                chats.first_s.append(time.perf_counter() - began)
                first = True
        chats.ended.append(ANSWERED)
    except MillstreamError as error:
        chats.ended.append(name_of(error))


def _report(load: Load, rounds: Rounds, alone: Chats, beside: Chats) -> Report:
    ratio = rounds["beside"].over(rounds["alone"])
    chats = alone.ended + beside.ended
    ttft = {share: (percentile(alone.first_s, share), percentile(beside.first_s, share)) for share in (0.5, 0.9, 0.99)}
    tables = [
        Table(
            f"Seconds to the first token of a chat, every {load.every_s:g} s in the mean",
            ["", "alone", "beside bulk", "beside / alone"],
            [[f"p{share * 100:g}", before, after, after / before] for share, (before, after) in ttft.items()],
            f"{len(alone.first_s)} chats alone, {len(beside.first_s)} beside bulk: {counted(chats)}",
        ),
        Table(
            f"Bulk: {load.bulk} texts of {load.bulk_tokens} tokens in {SLOTS} slots",
            ["", "tokens/s", "texts that differ from the first run's"],
            [
                ["alone", rounds["alone"], rounds["differ alone"]],
                ["beside chats", rounds["beside"], rounds["differ beside"]],
                ["beside / alone", ratio, ""],
            ],
        ),
    ]
    before, after = ttft[0.99]
    # The first run is compared with itself, so the others differ a little more often.
    most_differ = 2 * sum(rounds["differ alone"].values)
    targets = [
        at_most("time to the first token, p99: beside bulk / alone", after / before, MOST_TTFT),
        at_least("bulk: beside chats / alone", ratio.median, LEAST_BULK),
        at_most("bulk texts that differ beside chats, in all", sum(rounds["differ beside"].values), most_differ),
        at_most("chats that failed", sum(each != ANSWERED for each in chats), 0),
        at_least("chats, of the fewer", min(len(alone.first_s), len(beside.first_s)), 100),
    ]
    return Report(tables, targets)
