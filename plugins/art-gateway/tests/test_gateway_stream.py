"""Streams, deaths, departures and load: every answer ends in a way that can be told apart, and every route is let go.

The upstream is a server written for these tests, so that it can stall and vanish on demand; real engines answer behind
the gateway in the conformance suite.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import StreamingResponse

from art_gateway.sse import EventReader

_DYING_SERVER = """
import asyncio, json, os, sys
async def serve(reader, writer):
    head = await reader.readuntil(b"\\r\\n\\r\\n")
    if b"stream" in await reader.read(65536):
        chunk = {"choices": [{"index": 0, "delta": {"content": "x"}, "token_ids": [1]}], "prompt_token_ids": [2]}
        data = b"data: " + json.dumps(chunk).encode() + b"\\n\\n"
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Type: text/event-stream\\r\\n")
        writer.write(b"Transfer-Encoding: chunked\\r\\n\\r\\n")
        writer.write(b"%x\\r\\n%s\\r\\n" % (len(data), data))
        await writer.drain()
    print("asked", flush=True)
    await asyncio.sleep(60)
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def _events(raw: bytes) -> list[Any]:
    datas = [event.removeprefix(b"data: ") for event in raw.split(b"\n\n") if event]
    return [data.decode() if data == b"[DONE]" else json.loads(data) for data in datas]


async def _raw_stream(stage: Any, **fields: Any) -> list[Any]:
    body = {"model": "agent", "messages": [], "stream": True, **fields}
    async with stage.client.post(f"{stage.url}/p/v1/chat/completions", json=body) as answer:
        assert answer.status == 200
        assert answer.headers["x-art-step"] == "3"
        return _events(await answer.read())


async def test_each_chunk_carries_its_ids_and_its_step(stage: Any) -> None:
    *chunks, done = await _raw_stream(stage)
    assert done == "[DONE]"
    assert [chunk["model"] for chunk in chunks] == ["agent@3"] * 4
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[0], [1], [2], [3]]
    assert [chunk["choices"][0]["policy_version"] for chunk in chunks] == [3] * 4
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [11, 12, 13]
    await stage.settled()
    assert stage.routes.released == [3]


async def test_each_chunk_of_a_filtered_answer_says_so(stage: Any) -> None:
    *chunks, _ = await _raw_stream(stage, top_p=0.5)
    assert [chunk["choices"][0]["altered_sampling"] for chunk in chunks] == [["top_p"]] * 4
    *chunks, _ = await _raw_stream(stage)
    assert not any("altered_sampling" in chunk["choices"][0] for chunk in chunks)


async def test_the_openai_client_gets_chunks_as_they_are_made(stage: Any) -> None:
    stage.upstream.gate.clear()
    async with openai.AsyncOpenAI(base_url=f"{stage.url}/p/v1", api_key="the-users-key") as client:
        stream = await client.chat.completions.create(
            model="agent", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        first = await anext(stream)
        # The upstream still waits: the first chunk came without the second.
        assert first.choices[0].delta.content == "The "
        assert first.choices[0].policy_version == 3  # type: ignore[attr-defined]
        assert stage.routes.in_flight == 1
        stage.upstream.gate.set()
        rest = [chunk.choices[0].delta.content async for chunk in stream]
    assert rest == ["answer ", "is ", "42."]
    await stage.settled()


async def test_an_engine_killed_in_the_middle_of_a_stream_leaves_an_error_not_an_end(stage: Any) -> None:
    server = subprocess.Popen([sys.executable, "-c", _DYING_SERVER], stdout=subprocess.PIPE)
    assert server.stdout is not None
    try:
        stage.routes.upstream_url = f"http://127.0.0.1:{int(await asyncio.to_thread(server.stdout.readline))}"
        streaming = asyncio.create_task(_raw_stream(stage))
        assert await asyncio.to_thread(server.stdout.readline) == b"asked\n"
        os.kill(server.pid, signal.SIGKILL)
        chunk, error = await streaming
        assert chunk["choices"][0]["policy_version"] == 3
        assert error["error"]["code"] == "engine_died"
    finally:
        server.kill()
        server.wait(10)
        server.stdout.close()
    await stage.settled()


@asynccontextmanager
async def _asked_and_killed(stage: Any) -> AsyncIterator[asyncio.Task[Any]]:
    """Gives a request whose server is killed once it has it; it is dead when the block ends."""
    server = subprocess.Popen([sys.executable, "-c", _DYING_SERVER], stdout=subprocess.PIPE)
    assert server.stdout is not None
    try:
        stage.routes.upstream_url = f"http://127.0.0.1:{int(await asyncio.to_thread(server.stdout.readline))}"
        asking = asyncio.create_task(stage.chat())
        assert await asyncio.to_thread(server.stdout.readline) == b"asked\n"
        yield asking
    finally:
        server.kill()
        await asyncio.to_thread(server.wait, 10)
        server.stdout.close()


@pytest.mark.slow
async def test_an_engine_killed_before_it_answers_and_not_back_is_a_503(stage: Any) -> None:
    async with _asked_and_killed(stage) as asking:
        pass
    status, body, headers = await asking
    assert (status, body["error"]["code"]) == (503, "engine_unavailable")
    assert int(headers["retry-after"]) >= 1
    assert stage.routes.unreachable >= 2
    await stage.settled()


async def test_a_request_whose_engine_is_killed_is_answered_by_the_next_one_from_the_same_step(stage: Any) -> None:
    another = stage.routes.upstream_url
    async with _asked_and_killed(stage) as asking:
        stage.routes.publish("p", "agent", 4)
        stage.routes.upstream_url = another
    status, body, _ = await asking
    assert (status, body["model"]) == (200, "agent@3")
    assert stage.routes.unreachable == 1
    await stage.settled()


async def test_a_request_that_ends_every_engine_is_asked_twice_and_no_more(stage: Any) -> None:
    asked = []

    def break_off(body: dict[str, Any]) -> StreamingResponse:
        asked.append(body)

        async def cut() -> AsyncIterator[bytes]:
            yield b'{"choices": ['
            raise ConnectionResetError

        return StreamingResponse(cut(), media_type="application/json")

    stage.upstream.behave = break_off
    status, body, _ = await stage.chat()
    assert (status, body["error"]["code"]) == (502, "engine_died")
    assert len(asked) == 2
    await stage.settled()


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("", "engine_died"),
        ('data: {"choices": [{"ind\n\n', "engine_answer_unusable"),
        ("data: 5\n\n", "engine_answer_unusable"),
    ],
)
async def test_a_stream_that_ends_badly_says_so(stage: Any, ending: str, code: str) -> None:
    async def stream() -> AsyncIterator[str]:
        yield 'data: {"choices": [{"index": 0, "delta": {}, "token_ids": [1]}]}\n\n' + ending

    stage.upstream.behave = lambda body: StreamingResponse(stream(), media_type="text/event-stream")
    chunk, error = await _raw_stream(stage)
    assert chunk["choices"][0]["policy_version"] == 3
    assert error["error"]["code"] == code


async def test_comments_errors_and_usage_pass_through_a_stream(stage: Any) -> None:
    raw = (
        ": ping\n\n"
        'event: message\ndata: {"choices": [{"index": 0, "delta": {}, "token_ids": [1]}]}\n\n'
        'data: {"choices": [], "usage": {"total_tokens": 5}}\n\n'
        'data:  {"error":   {"message": "out of cache"}}\n\n'
    )

    async def stream() -> AsyncIterator[str]:
        for letter in raw:
            yield letter

    stage.upstream.behave = lambda body: StreamingResponse(stream(), media_type="text/event-stream")
    body = {"model": "agent", "messages": [], "stream": True}
    async with stage.client.post(f"{stage.url}/p/v1/chat/completions", json=body) as answer:
        ping, first, usage, error, end = (await answer.read()).split(b"\n\n")
    assert ping == b": ping"
    assert first.startswith(b"event: message\ndata: {")
    assert json.loads(usage.removeprefix(b"data: "))["usage"] == {"total_tokens": 5}
    assert error == b'data:  {"error":   {"message": "out of cache"}}'
    assert end == b""


async def test_a_client_that_leaves_stops_the_engine_and_lets_the_route_go(stage: Any) -> None:
    stage.upstream.gate.clear()
    for stream in (False, True):
        stage.upstream.gone.clear()
        asking = asyncio.create_task(_raw_stream(stage) if stream else stage.chat())
        async with asyncio.timeout(10):
            await stage.upstream.arrived.acquire()
        assert stage.routes.in_flight == 1
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await stage.settled()
        async with asyncio.timeout(10):
            await stage.upstream.gone.wait()
    assert stage.routes.released == [3, 3]


async def test_a_client_that_leaves_while_waiting_for_a_route_leaves_no_count(stage: Any) -> None:
    stage.routes.wait = asyncio.Event()
    asking = asyncio.create_task(stage.chat())
    await asyncio.sleep(0.1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await asyncio.sleep(0.1)
    stage.routes.wait.set()
    assert (await stage.chat())[0] == 200
    await stage.settled()
    assert stage.routes.released == [3]


async def test_requests_in_flight_keep_their_step_when_the_route_moves(stage: Any) -> None:
    stage.upstream.gate.clear()
    before = [asyncio.create_task(stage.chat()) for _ in range(20)]
    streaming = asyncio.create_task(_raw_stream(stage))
    for _ in range(21):
        async with asyncio.timeout(10):
            await stage.upstream.arrived.acquire()
    served = stage.routes.publish("p", "agent", 4)
    after = [asyncio.create_task(stage.chat()) for _ in range(20)]
    for _ in range(20):
        async with asyncio.timeout(10):
            await stage.upstream.arrived.acquire()
    assert (served.in_flight(3), served.in_flight(4)) == (21, 20)
    assert served.idle() == []
    stage.upstream.gate.set()
    for tasks, step in ((before, 3), (after, 4)):
        for status, body, headers in await asyncio.gather(*tasks):
            assert (status, body["model"], headers["x-art-step"]) == (200, f"agent@{step}", str(step))
            assert body["choices"][0]["policy_version"] == step
            assert body["choices"][0]["message"]["content"] == f"p/agent@{step}"
    assert {chunk["model"] for chunk in (await streaming)[:-1]} == {"agent@3"}
    await stage.settled()
    assert served.idle() == [3]


@pytest.mark.slow
async def test_two_thousand_requests_at_once_are_all_in_flight_and_all_answered(stage: Any) -> None:
    stage.upstream.gate.clear()
    # An upstream that looks for disconnects fifty times a second would be the load, not the gateway.
    stage.upstream.behave = stage.upstream.hold
    asking = [asyncio.create_task(stage.chat()) for _ in range(2000)]
    async with asyncio.timeout(120):
        while stage.routes.in_flight < 2000 or len(stage.upstream.requests) < 2000:
            assert [task.result()[:2] for task in asking if task.done()] == []
            await asyncio.sleep(0.05)
        stage.upstream.gate.set()
        answers = await asyncio.gather(*asking)
    assert {status for status, _, _ in answers} == {200}
    await stage.settled()
    assert len(stage.routes.released) == 2000


@given(
    events=st.lists(st.sampled_from([b": ping", b"data: {}", b"data: a\ndata: b", b"event: e\ndata: c"]), max_size=6),
    end=st.sampled_from([b"\n\n", b"\r\n\r\n"]),
    cuts=st.lists(st.integers(0, 200), max_size=20),
)
def test_events_are_the_same_however_the_stream_is_cut(events: list[bytes], end: bytes, cuts: list[int]) -> None:
    newline = end[: len(end) // 2]
    whole = b"".join(event.replace(b"\n", newline) + end for event in events)
    places = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    reader = EventReader()
    read = [event for a, b in itertools.pairwise(places) for event in reader.feed(whole[a:b])]
    assert b"".join(event.raw for event in read) == whole
    assert len(read) == len(events)
    assert reader.left == 0
    for event, expected in zip(read, events, strict=True):
        datas = [line[6:] for line in expected.split(b"\n") if line.startswith(b"data: ")]
        assert event.data == (b"\n".join(datas) if datas else None)
