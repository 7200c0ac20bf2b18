"""A loopback TCP proxy that can cut what runs through it, swallow it for a while, and slow it down."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

T = TypeVar("T")

_CHUNK = 64 * 1024
_NO_LINGER = struct.pack("ii", 1, 0)


@dataclass(eq=False)
class _Link:
    """One connection: the side that came, and the side that was opened for it."""

    near: asyncio.StreamWriter
    far: asyncio.StreamWriter

    def reset(self) -> None:
        """RST to both sides, whatever was under way."""
        for writer in (self.near, self.far):
            sock = writer.get_extra_info("socket")
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            writer.transport.abort()


@dataclass
class _Weather:
    """What the chunks under way meet. `open` is cleared while nothing passes."""

    delay_s: float = 0.0
    open: asyncio.Event = field(default_factory=asyncio.Event)
    withheld: int = 0
    delayed: int = 0


class Proxy:
    """Listens on a port of its own and forwards to `target_port`; runs in a thread, until `close`."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._links: set[_Link] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.opened = 0
        self._weather, self._server = self._call(self._listen())
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def cut(self, share: float, chance: Random) -> int:
        """Reset about `share` of the connections; how many."""
        return self._call(self._cut(share, chance))

    def blackhole(self) -> None:
        """From now on nothing passes, and nobody is told: connections stay open, new ones too."""
        self._call(self._shut())

    def delay(self, seconds: float) -> None:
        """Hold each chunk back so long."""
        self._weather.delay_s = seconds

    def clear(self) -> tuple[int, int]:
        """Let everything pass again; how many chunks were withheld, and how many delayed, since the last time."""
        return self._call(self._clear())

    def close(self) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, action: Coroutine[None, None, T]) -> T:
        return asyncio.run_coroutine_threadsafe(action, self._loop).result()

    async def _listen(self) -> tuple[_Weather, asyncio.Server]:
        weather = _Weather()
        weather.open.set()
        return weather, await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _serve(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        try:
            back, far = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            # The server is down: whoever came is refused, as it would be without a proxy.
            near.transport.abort()
            return
        link = _Link(near, far)
        self._links.add(link)
        self.opened += 1
        try:
            await asyncio.wait(
                [asyncio.ensure_future(self._pump(reader, far)), asyncio.ensure_future(self._pump(back, near))],
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            self._links.discard(link)
            for writer in (near, far):
                writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry chunks until one side ends; a fault of the connection is an end."""
        weather = self._weather
        with suppress(OSError):
            while chunk := await reader.read(_CHUNK):
                if weather.delay_s:
                    weather.delayed += 1
                    await asyncio.sleep(weather.delay_s)
                if not weather.open.is_set():
                    weather.withheld += 1
                    await weather.open.wait()
                writer.write(chunk)
                await writer.drain()

    async def _cut(self, share: float, chance: Random) -> int:
        chosen = [link for link in list(self._links) if chance.random() < share]
        for link in chosen:
            link.reset()
        return len(chosen)

    async def _shut(self) -> None:
        self._weather.open.clear()

    async def _clear(self) -> tuple[int, int]:
        weather = self._weather
        counts = weather.withheld, weather.delayed
        weather.delay_s, weather.withheld, weather.delayed = 0.0, 0, 0
        weather.open.set()
        return counts

    async def _end(self) -> None:
        self._server.close()
        weather = self._weather
        weather.open.set()
        for link in list(self._links):
            link.reset()
        # Their pumps end by themselves.
        while self._links:
            await asyncio.sleep(0.01)
