"""Streaming calls: iterators over the text of one job while it is generated."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType, TracebackType
from typing import Self, cast

from millstream.broker.contract.errors import Cancelled, MillstreamError, StreamDiverged
from millstream.broker.contract.partial import Delta
from millstream.client.channel.loop_calls import Changed, listener
from millstream.client.generate import NO_USAGE, Generated
from millstream.client.growing_text import GrowingText
from millstream.client.handle import ABANDON_S, Handle
from millstream.client.partial_text import PartialText
from millstream.client.result import Timings, Values, generations

_NO_TIMINGS: Timings = MappingProxyType({})


class TextCall:
    """Streaming call as the blocking and the async iterator share it: decides what comes next. Never waits."""

    generated: Generated | None = None
    usage: Mapping[str, int] = NO_USAGE
    timings: Timings = _NO_TIMINGS
    fingerprint: str = ""

    def __init__(self, handle: Handle, growing: GrowingText) -> None:
        self.handle = handle
        self.growing = growing
        self._so_far = (handle.id, PartialText(handle.id))
        self._error: MillstreamError | None = None

    @property
    def so_far(self) -> PartialText:
        """The text that the server has of the job, which is another one after a fallback."""
        job_id = self.handle.id
        if self._so_far[0] != job_id:
            self._so_far = (job_id, PartialText(job_id))
        return self._so_far[1]

    @property
    def finish_reason(self) -> str | None:
        """The reason for the text's end; None until `advance` has read the reply."""
        return self.generated.finish_reason if self.generated else None

    @property
    def has_gap(self) -> bool:
        """Whether the next piece is missing, and the server may have it."""
        return self.growing.has_gap

    def advance(self) -> str | None:
        """Returns the next piece of the text, "" if it is not there yet, None if the text is complete.

        Raises the call's error once all pieces before it were returned.
        """
        # Before the pieces are looked at: the reply comes after all deltas.
        over = self.handle.ready
        if self._error:
            raise self._error
        if piece := self.growing.take():
            return piece
        if not over:
            return ""
        if self.generated is None:
            self._finish()
        return self.growing.take() or None

    def fill(self, so_far: Delta) -> None:
        """Takes text as the server has it, no text if it has none. Raises StreamDiverged."""
        try:
            self.growing.fill(so_far.text, so_far.offset)
        except StreamDiverged as error:
            self._error = error
            self.handle.cancel_soon()
            raise

    def _finish(self) -> None:
        try:
            result = self.handle.result(0)
            # One: the job has one row, and each row has a result.
            (generated,) = generations(result)
            self.growing.finish(generated.text)
        except MillstreamError as error:
            self._error = error
            raise
        values = cast(Values, result)
        self.usage, self.timings, self.fingerprint = values.usage, values.timings, values.fingerprint
        # Set last: another thread that sees it may read the rest.
        self.generated = generated


class TextStream(Iterator[str]):
    """Iterator over the pieces of a text, in order, while a service generates it.

    The pieces together are the whole text; each part of it comes once. `next` blocks until there is a piece. It raises
    StopIteration when the text is complete, and `finish_reason` then says why it ended; otherwise the error of the
    call, after the pieces before it: those of Client.embed, Cancelled after `close`, StreamDiverged if two runs of the
    job generated different texts.

    `close` and the end of a `with` block cancel the job. A stream that is only dropped does not: as with a Handle, its
    job goes on.
    """

    def __init__(self, call: TextCall, read_partial: Callable[[TextCall], Delta]) -> None:
        self._call = call
        self._read_partial = read_partial

    @property
    def id(self) -> str:
        """Id of the job."""
        return self._call.handle.id

    @property
    def text(self) -> str:
        """The text that the iteration has given so far."""
        return self._call.growing.text

    @property
    def finish_reason(self) -> str | None:
        """The reason for the text's end, such as "stop" or "length"; None until the iteration has ended so."""
        return self._call.finish_reason

    @property
    def generated(self) -> Generated | None:
        """The whole result; None until the iteration has ended."""
        return self._call.generated

    @property
    def usage(self) -> Mapping[str, int]:
        """Tokens as in Embeddings.usage; empty until the iteration has ended."""
        return self._call.usage

    @property
    def timings(self) -> Timings:
        """Times as in Embeddings.timings; empty until the iteration has ended."""
        return self._call.timings

    @property
    def fingerprint(self) -> str:
        """The weights as in Embeddings.fingerprint; empty until the iteration has ended."""
        return self._call.fingerprint

    @property
    def version(self) -> str:
        """Version of the service's route that runs the job; "" without a route."""
        return self._call.handle.version

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        call = self._call
        try:
            while not (piece := call.advance()):
                if piece is None:
                    raise StopIteration
                if call.has_gap:
                    call.fill(self._read_partial(call))
                else:
                    call.handle.wait_for_text()
            return piece
        except (MillstreamError, StopIteration):
            raise
        except BaseException:
            # An interrupt of this thread, such as Ctrl-C, cancels the call, as in Handle.finish.
            with suppress(MillstreamError):
                call.handle.cancel(ABANDON_S)
            raise

    def close(self) -> None:
        """Cancels the job, without waiting for the server. Does nothing if its reply has arrived."""
        self._call.handle.cancel_soon()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncTextStream:
    """Async iterator over the pieces of a text, with the attributes and errors of TextStream.

    The call begins with the first `async for` step or with `async with`. One task at a time may iterate; cancelling it
    cancels the job.
    """

    def __init__(
        self, begin: Callable[[], Awaitable[TextCall]], read_partial: Callable[[TextCall], Awaitable[Delta]]
    ) -> None:
        self._begin = begin
        self._read_partial = read_partial
        self._call: TextCall | None = None
        self._closed = False

    @property
    def id(self) -> str:
        """Id of the job; "" before the call begins."""
        return self._call.handle.id if self._call else ""

    @property
    def text(self) -> str:
        """Does as TextStream.text."""
        return self._call.growing.text if self._call else ""

    @property
    def finish_reason(self) -> str | None:
        """Does as TextStream.finish_reason."""
        return self._call.finish_reason if self._call else None

    @property
    def generated(self) -> Generated | None:
        """Does as TextStream.generated."""
        return self._call.generated if self._call else None

    @property
    def usage(self) -> Mapping[str, int]:
        """Does as TextStream.usage."""
        return self._call.usage if self._call else NO_USAGE

    @property
    def timings(self) -> Timings:
        """Does as TextStream.timings."""
        return self._call.timings if self._call else _NO_TIMINGS

    @property
    def fingerprint(self) -> str:
        """Does as TextStream.fingerprint."""
        return self._call.fingerprint if self._call else ""

    @property
    def version(self) -> str:
        """Does as TextStream.version; "" before the call begins."""
        return self._call.handle.version if self._call else ""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        call = await self._begun()
        try:
            while not (piece := call.advance()):
                if piece is None:
                    raise StopAsyncIteration
                if call.has_gap:
                    call.fill(await self._read_partial(call))
                else:
                    await _text_or_end(call.handle)
            return piece
        except (MillstreamError, StopAsyncIteration):
            raise
        except BaseException:
            call.handle.cancel_soon()
            raise

    async def close(self) -> None:
        """Does as TextStream.close."""
        self._closed = True
        if self._call:
            self._call.handle.cancel_soon()

    async def __aenter__(self) -> Self:
        await self._begun()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _begun(self) -> TextCall:
        if self._call is None:
            if self._closed:
                raise Cancelled("cancelled by its caller")
            self._call = await self._begin()
            if self._closed:
                # Another task closed the stream meanwhile.
                self._call.handle.cancel_soon()
        return self._call


async def _text_or_end(handle: Handle) -> None:
    """Waits until there is text to take or a gap to fill, or the call is over."""
    changed = Changed()
    wake = listener(changed.set)
    try:
        handle.listen(wake)
        while not (handle.has_text or handle.ready):
            handle.expire()
            await changed.wait(handle.seconds_left)
    finally:
        handle.unlisten(wake)
