"""Random lives of requests for texts, many at once: they end, are refused, cut by a deadline, left or cancelled."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

from millstream.broker.contract.errors import DeadlineExceeded, InvalidRequest
from millstream.broker.contract.job import PRIORITIES
from millstream.client import AsyncClient, Generated

AT_ONCE = 24
ENDS = ("whole", "read", "formed", "refused", "deadline", "left", "cancelled")

Target = tuple[str, int]
"""A service, and the number of tokens that a prompt must not reach there."""


class Lives:
    """Makes lives of one client."""

    def __init__(self, url: str, rng: random.Random) -> None:
        self._url = url
        self._rng = rng

    def run(self, targets: Sequence[Target], count: int) -> Counter[str]:
        """Makes `count` lives, AT_ONCE of them at the same time. Returns how many ended in each of ENDS."""
        return asyncio.run(self._run(targets, count))

    async def _run(self, targets: Sequence[Target], count: int) -> Counter[str]:
        numbers = iter(range(count))
        ends: Counter[str] = Counter()

        async def live() -> None:
            for _ in numbers:
                end = self._rng.choice(ENDS)
                await getattr(self, f"_{end}")(client, *self._rng.choice(targets))
                ends[end] += 1

        async with AsyncClient(self._url) as client, asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(live())
        return ends

    def _call(self, service: str) -> dict[str, Any]:
        """Arguments of a call: a short prompt, of which some begin alike, and some options."""
        rng = self._rng
        prompt = [*[7] * rng.choice((0, 64, 100)), *(rng.randrange(8, 250) for _ in range(rng.randint(1, 40)))]
        sampling = {"temperature": 1.0, "seed": rng.randrange(100)} if rng.random() < 0.5 else {}
        return {"prompt": prompt, "service": service, "priority": rng.choice(PRIORITIES).name.lower(), **sampling}

    async def _whole(self, client: AsyncClient, service: str, most: int) -> None:
        tokens = self._rng.randint(1, 12)
        got = await client.generate(**self._call(service), max_tokens=tokens, ignore_eos=True)
        assert isinstance(got, Generated)
        assert (got.finish_reason, got.usage["completion_tokens"]) == ("length", tokens)

    async def _read(self, client: AsyncClient, service: str, most: int) -> None:
        stream = client.generate_stream(**self._call(service), max_tokens=self._rng.randint(1, 12))
        text = "".join([delta.text async for delta in stream])
        assert stream.generated
        assert stream.generated.text == text

    async def _formed(self, client: AsyncClient, service: str, most: int) -> None:
        form = {"type": "regex", "pattern": "[a-z]{2,6}"}
        got = cast(Generated, await client.generate(**self._call(service), response_format=form))
        assert got.text.isalpha()

    async def _refused(self, client: AsyncClient, service: str, most: int) -> None:
        calls: list[dict[str, Any]] = [
            {"prompt": [10**6]},
            {"prompt": [5] * most},
            {"prompt": "a", "response_format": {"type": "regex", "pattern": "(["}},
        ]
        try:
            await client.generate(service=service, **self._rng.choice(calls))
        except InvalidRequest:
            return
        raise AssertionError("a call was not refused")

    async def _deadline(self, client: AsyncClient, service: str, most: int) -> None:
        timeout = self._rng.uniform(0.01, 0.3)
        try:
            got = await client.generate(**self._call(service), ignore_eos=True, timeout=timeout)
        except DeadlineExceeded:
            return
        assert cast(Generated, got).finish_reason in ("deadline", "length")

    async def _left(self, client: AsyncClient, service: str, most: int) -> None:
        async with client.generate_stream(**self._call(service), ignore_eos=True) as stream:
            for _ in range(self._rng.randrange(4)):
                await anext(stream)

    async def _cancelled(self, client: AsyncClient, service: str, most: int) -> None:
        try:
            async with asyncio.timeout(self._rng.uniform(0.0, 0.2)):
                await client.generate(**self._call(service), ignore_eos=True)
        except TimeoutError:
            return
