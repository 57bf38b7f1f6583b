"""The event stream: told as work goes on, cancelled when its client goes, read whole out of any pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from art_engine_kit import event_stream
from art_engine_kit.event_stream import ALIVE, Emit, EventLines, EventStream, LineTooLong, client_gone, has_key


class Connection:
    """A client's end: what it was sent, and whether it goes away."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.put_nowait(message)

    def answer(self, stream: EventStream) -> asyncio.Task[None]:
        return asyncio.create_task(stream({"headers": []}, self.receive, self.send))

    async def line(self) -> bytes:
        """The next piece of the body."""
        async with asyncio.timeout(10):
            return bytes((await self.sent.get())["body"])


async def begun(connection: Connection) -> dict[str, Any]:
    async with asyncio.timeout(10):
        start: dict[str, Any] = await connection.sent.get()
    return start


async def test_each_event_is_sent_when_it_is_emitted() -> None:
    go = asyncio.Event()

    async def work(emit: Emit) -> None:
        emit('{"event": "ü"}')
        await go.wait()
        emit(b"2")

    connection = Connection()
    answer = connection.answer(EventStream(work))
    start = await begun(connection)
    assert (start["status"], dict(start["headers"])[b"content-type"]) == (200, b"application/x-ndjson")
    assert await connection.line() == '{"event": "ü"}\n'.encode()
    assert connection.sent.empty()
    go.set()
    assert [await connection.line(), await connection.line()] == [b"2\n", b""]
    await answer


async def test_silence_says_that_somebody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "ALIVE_EVERY_S", 0.01)
    go = asyncio.Event()

    async def work(emit: Emit) -> None:
        await go.wait()
        emit("1")

    connection = Connection()
    answer = connection.answer(EventStream(work))
    await begun(connection)
    assert [await connection.line() for _ in range(3)] == [ALIVE + b"\n"] * 3
    go.set()
    await answer
    pieces = [connection.sent.get_nowait()["body"] for _ in range(connection.sent.qsize())]
    assert [line async for line in EventLines(pieces_of(pieces))] == [b"1"]


async def test_a_client_that_goes_cancels_the_work_and_waits_for_it() -> None:
    told: list[str] = []

    async def work(emit: Emit) -> None:
        emit("1")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            told.append("cancelled")
            await asyncio.sleep(0)
            told.append("tidied up")
            raise

    connection = Connection()
    answer = connection.answer(EventStream(work))
    await begun(connection)
    await connection.line()
    connection.left.set()
    await asyncio.wait_for(answer, 10)
    assert told == ["cancelled", "tidied up"]


async def test_an_answer_that_is_cancelled_takes_its_work_along() -> None:
    ended = asyncio.Event()

    async def work(emit: Emit) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    connection = Connection()
    answer = connection.answer(EventStream(work))
    await begun(connection)
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    assert ended.is_set()


async def test_work_that_raises_ends_the_answer_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def work(emit: Emit) -> None:
        emit("1")
        raise RuntimeError("forgot to say so")

    connection = Connection()
    await connection.answer(EventStream(work))
    await begun(connection)
    assert [await connection.line(), await connection.line()] == [b"1\n", b""]
    assert "forgot to say so" in caplog.text


async def pieces_of(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


@given(lines=st.lists(st.binary().map(lambda b: b.replace(b"\n", b"").strip())), cuts=st.lists(st.integers(0, 400)))
def test_lines_are_the_same_however_they_are_cut(lines: list[bytes], cuts: list[int]) -> None:
    whole = b"".join(line + b"\n" for line in lines)
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = [whole[a:b] for a, b in pairwise(places)]

    async def read() -> list[bytes]:
        return [line async for line in EventLines(pieces_of(pieces))]

    assert asyncio.run(read()) == [line for line in lines if line not in (b"", ALIVE)]


async def test_what_was_cut_off_is_no_line() -> None:
    assert [line async for line in EventLines(pieces_of([b'1\n{"event": "al', b'ive"}\n\n2\n{"ev']))] == [b"1", b"2"]


@pytest.mark.parametrize("pieces", [[b"x" * 11], [b"xxxxxx", b"xxxxxx\n"], [b"1\n" + b"x" * 11 + b"\n2\n"]])
async def test_a_line_that_never_ends_is_refused(pieces: list[bytes]) -> None:
    with pytest.raises(LineTooLong, match="more than 10 bytes"):
        _ = [line async for line in EventLines(pieces_of(pieces), limit=10)]


async def test_a_client_is_gone_when_it_says_so() -> None:
    messages = iter([{"type": "http.request"}, {"type": "http.disconnect"}])

    async def receive() -> dict[str, Any]:
        return next(messages)

    await asyncio.wait_for(client_gone(receive), 10)
    assert not list(messages)


@pytest.mark.parametrize(
    ("header", "fits"),
    [
        (b"Bearer k\xc3\xa4y", True),
        (b"Bearer k\xe4y", False),
        (b"Bearer other", False),
        (b"k\xc3\xa4y", False),
        (b"", False),
        (None, False),
    ],
)
def test_the_key_is_compared_as_a_whole(header: bytes | None, fits: bool) -> None:
    headers = [(b"host", b"x")] + ([] if header is None else [(b"authorization", header)])
    assert has_key({"headers": headers}, "käy") is fits
