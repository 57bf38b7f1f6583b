"""Every wait has an end: engines that don't answer, clients that don't send or don't read, routes that don't come.

The upstream is a server written for these tests, so that it can stall on demand; real engines answer behind the gateway
in the conformance suite.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from starlette.responses import StreamingResponse

from art_gateway import GatewayLimits, Listener, create_app, raise_file_limit


@pytest.fixture
def limits() -> GatewayLimits:
    return GatewayLimits(request_s=0.5, route_s=0.5, connect_s=0.5, answer_s=0.5, reader_s=0.5)


@pytest.mark.slow
async def test_an_engine_that_does_not_answer(stage: Any) -> None:
    stage.upstream.gate.clear()
    status, body, _ = await stage.chat()
    assert (status, body["error"]["code"]) == (504, "engine_timeout")
    await stage.settled()


@pytest.mark.slow
async def test_an_engine_that_does_not_end_its_stream(stage: Any) -> None:
    stage.upstream.gate.clear()
    request = {"model": "agent", "messages": [], "stream": True}
    async with stage.client.post(f"{stage.url}/p/v1/chat/completions", json=request) as answer:
        chunk, error, _ = (await answer.read()).split(b"\n\n")
    assert json.loads(chunk.removeprefix(b"data: "))["choices"][0]["policy_version"] == 3
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "engine_timeout"
    await stage.settled()


@pytest.mark.slow
async def test_a_route_that_does_not_come(stage: Any) -> None:
    stage.routes.wait = asyncio.Event()
    status, body, headers = await stage.chat()
    assert (status, body["error"]["code"]) == (503, "engine_unavailable")
    assert headers["retry-after"] == "10"


@pytest.mark.slow
async def test_a_client_that_does_not_send_its_body(stage: Any) -> None:
    address = urlsplit(stage.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = "POST /p/v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer the-users-key\r\n"
    writer.write(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    async with asyncio.timeout(10):
        assert b" 408 " in await reader.readline()
    writer.close()


@pytest.mark.slow
async def test_a_client_that_does_not_read_its_answer_lets_its_step_go(stage: Any) -> None:
    async def stream() -> AsyncIterator[bytes]:
        chunk = {"choices": [{"index": 0, "delta": {"content": "x" * 100_000}, "token_ids": [1]}]}
        for _ in range(1000):
            await asyncio.sleep(0)
            yield b"data: " + json.dumps(chunk).encode() + b"\n\n"

    stage.upstream.behave = lambda body: StreamingResponse(stream(), media_type="text/event-stream")
    address = urlsplit(stage.url)
    _, writer = await asyncio.open_connection(address.hostname, address.port)
    body = b'{"model": "agent", "messages": [], "stream": true}'
    head = "POST /p/v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer the-users-key\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    async with asyncio.timeout(10):
        await stage.upstream.arrived.acquire()
    assert stage.routes.in_flight == 1
    await stage.settled()
    assert stage.routes.released == [3]
    writer.close()


async def test_an_engine_plugin_that_fails_is_a_500_and_the_route_is_let_go(
    stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, endpoint: str, body: Any) -> Any:
        raise KeyError("token_ids")

    stage.upstream.gate.set()
    route = await stage.routes.acquire("p", "agent")
    route.release()
    monkeypatch.setattr(type(route.engine), "read_response", broken)
    status, body, _ = await stage.chat()
    assert (status, body["error"]["code"]) == (500, "gateway_error")
    await stage.settled()
    assert stage.routes.released == [3, 3]


def test_a_gateway_without_a_key_is_refused(stage: Any) -> None:
    with pytest.raises(ValueError, match="needs an API key"):
        create_app(stage.routes, api_key="")


def test_the_file_limit_is_raised_to_what_is_allowed() -> None:
    allowed = raise_file_limit()
    assert allowed == raise_file_limit()


@pytest.mark.slow
async def test_connections_beyond_what_files_allow_wait_for_those_before() -> None:
    served, open_now, most = 0, 0, 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served, open_now, most
        open_now += 1
        most = max(most, open_now)
        await reader.readline()
        await asyncio.sleep(0.05)
        served += 1
        writer.write(b"done\n")
        writer.close()
        open_now -= 1

    async def ask(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"please\n")
        answer = await reader.readline()
        writer.close()
        return answer

    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    with Listener(backlog=100, full=lambda: open_now >= 10) as listener:
        async with await asyncio.start_server(serve, sock=listener, backlog=5):
            answers = await asyncio.gather(*(ask(listener.getsockname()[1]) for _ in range(40)))
    assert answers == [b"done\n"] * 40
    # A few more than the limit are taken before the first of them is counted.
    assert most < 20


SMALL_GATEWAY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
sys.path.insert(0, sys.argv[1])
import uvicorn
from conftest import API_KEY, TableRoutes
from art_gateway import SERVER_OPTIONS, GatewayLimits, create_app
routes = TableRoutes(sys.argv[2])
routes.publish("p", "agent", 3)
app = create_app(routes, api_key=API_KEY, limits=GatewayLimits(refused_again_s=()))
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[3]), **SERVER_OPTIONS)
"""


@pytest.mark.slow
async def test_a_gateway_with_few_files_answers_all_the_same(stage: Any, unused_tcp_port: int) -> None:
    """Its connections to the engine are fewer than there are requests; the others wait."""
    folder = str(Path(__file__).parent)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SMALL_GATEWAY, folder, stage.routes.upstream_url, str(unused_tcp_port)),
    )
    url = f"http://127.0.0.1:{unused_tcp_port}"
    try:
        async with asyncio.timeout(30):
            while True:
                try:
                    async with stage.client.get(f"{url}/health") as answer:
                        assert answer.status == 200
                        break
                except aiohttp.ClientConnectorError:
                    await asyncio.sleep(0.05)

        async def ask() -> int:
            request = {"model": "agent", "messages": []}
            async with stage.client.post(f"{url}/p/v1/chat/completions", json=request) as answer:
                await answer.read()
                return int(answer.status)

        stage.upstream.gate.clear()
        asked = [asyncio.create_task(ask()) for _ in range(48)]
        for _ in range(30):
            await asyncio.wait_for(stage.upstream.arrived.acquire(), 10)
        stage.upstream.gate.set()
        assert await asyncio.gather(*asked) == [200] * 48
    finally:
        process.terminate()
        await process.wait()
