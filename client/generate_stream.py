"""Streams of generated text: the pieces of `generate_stream` and `chat_stream`, the last one with the usage."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from types import TracebackType
from typing import NamedTuple, Self

from millstream.client.generate import NO_USAGE, Generated
from millstream.client.streaming import AsyncTextStream, TextStream


class TextDelta(NamedTuple):
    """Piece of a generated text. Only the last one has a finish reason and the usage; its text is empty."""

    text: str
    finish_reason: str | None = None
    usage: Mapping[str, int] = NO_USAGE


class GenerateStream(Iterator[TextDelta]):
    """Iterator over the pieces of a generated text, as TextStream is; it raises the errors of TextStream.

    The texts of all pieces together are the whole text. If the text is complete, a last piece with an empty text has
    `finish_reason` and `usage`, and `generated` is the whole result. `close` and the end of a `with` block cancel the
    job.
    """

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream
        self._ended = False

    @property
    def id(self) -> str:
        """Id of the job."""
        return self._stream.id

    @property
    def text(self) -> str:
        """The text that the iteration has given so far."""
        return self._stream.text

    @property
    def generated(self) -> Generated | None:
        """The whole result; None until the iteration has ended."""
        return self._stream.generated if self._ended else None

    def __next__(self) -> TextDelta:
        if self._ended:
            raise StopIteration
        piece = next(self._stream, None)
        if piece is not None:
            return TextDelta(piece)
        self._ended = True
        return last_delta(self._stream.generated)

    def close(self) -> None:
        """Cancels the job, without waiting for the server. Does nothing if its reply has arrived."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncGenerateStream(AsyncIterator[TextDelta]):
    """Async iterator over the pieces of a generated text, as AsyncTextStream is, with the attributes of GenerateStream.

    The call begins with the first `async for` step or with `async with`.
    """

    def __init__(self, stream: AsyncTextStream) -> None:
        self._stream = stream
        self._ended = False

    @property
    def id(self) -> str:
        """Id of the job; "" before the call begins."""
        return self._stream.id

    @property
    def text(self) -> str:
        """Does as GenerateStream.text."""
        return self._stream.text

    @property
    def generated(self) -> Generated | None:
        """Does as GenerateStream.generated."""
        return self._stream.generated if self._ended else None

    async def __anext__(self) -> TextDelta:
        if self._ended:
            raise StopAsyncIteration
        piece = await anext(self._stream, None)
        if piece is not None:
            return TextDelta(piece)
        self._ended = True
        return last_delta(self._stream.generated)

    async def close(self) -> None:
        """Does as GenerateStream.close."""
        await self._stream.close()

    async def __aenter__(self) -> Self:
        await self._stream.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def last_delta(generated: Generated | None) -> TextDelta:
    """Returns the piece that ends a text."""
    return TextDelta("", generated.finish_reason, generated.usage) if generated else TextDelta("")
