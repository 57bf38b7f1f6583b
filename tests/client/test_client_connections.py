"""The OpenAI client's connections: on which event loop, through which proxy, and with how many open files."""

import asyncio
import subprocess
import sys
import textwrap

import openai
import pytest
from aiohttp import web

import art
from art.http_client import is_loopback

MESSAGES = [{"role": "user", "content": "x"}]
PROXIES = ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]


def client_of(url):
    return art.Model(name="m", project="p", inference_base_url=f"{url}/v1", inference_api_key="k").openai_client()


async def run(code, *arguments):
    """Run code in a process of its own, where `client` is one for the endpoint at argv[1]; gives what it printed."""
    head = """
        import asyncio, resource, sys, threading, warnings
        warnings.simplefilter("error")
        import art
        model = art.Model(name="m", project="p", inference_base_url=sys.argv[1] + "/v1", inference_api_key="k")

        async def ask(client, **more):
            messages = [{"role": "user", "content": "x"}]
            answer = await client.chat.completions.create(messages=messages, model="m", **more)
            return answer.choices[0].message.content
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code), *map(str, arguments)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), 60)
    except TimeoutError:
        process.kill()
        raise
    assert process.returncode == 0, err.decode()
    assert err.decode() == ""
    return out.decode().split()


WAYS = {
    "plain": {},
    "the package's own": {"extra_headers": {"x-a": "b"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
async def test_a_client_is_kept_over_several_event_loops(endpoint, way):
    said = await run(
        f"""
        client = model.openai_client()
        for _ in range(3):
            print(asyncio.run(ask(client, **{WAYS[way]!r})))
        """,
        endpoint.url,
    )
    assert said == ["Hello."] * 3


@pytest.mark.slow
async def test_a_client_is_used_by_several_event_loops_at_once(endpoint):
    code = """
        client = model.openai_client()

        async def often():
            for _ in range(50):
                assert await ask(client) == await ask(client, extra_headers={"x-a": "b"}) == "Hello."
            print("done\\n", end="")  # in one piece, since another thread may print too

        threads = [threading.Thread(target=asyncio.run, args=(often(),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    """
    assert await run(code, endpoint.url) == ["done"] * 4


async def test_a_closed_client_says_how_to_get_another(endpoint):
    client = client_of(endpoint.url)
    await client.close()
    for more in WAYS.values():
        with pytest.raises(Exception, match=r"model\.openai_client\(\)"):
            await client.with_options(max_retries=1).chat.completions.create(messages=MESSAGES, model="m", **more)


@pytest.fixture
def no_proxy_but(monkeypatch):
    """Set one proxy variable, to an address where nobody listens, and take away all others."""

    def only(name, value):
        for known in (*PROXIES, "NO_PROXY", "no_proxy"):
            monkeypatch.delenv(known, raising=False)
        monkeypatch.setenv(name, value)

    return only


@pytest.mark.parametrize("name", PROXIES)
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "127.0.0.1:9", "not an address"])
async def test_this_machine_is_never_asked_through_a_proxy(endpoint, no_proxy_but, name, proxy):
    no_proxy_but(name, proxy)
    good = endpoint.answer

    async def stream(request, body):
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def busy_once(request, body):
        endpoint.answer = good
        return web.Response(status=503, headers={"retry-after-ms": "1"})

    for host in ("127.0.0.1", "localhost"):
        client = client_of(endpoint.url.replace("127.0.0.1", host)).with_options(timeout=10, max_retries=1)
        create = client.chat.completions.create
        assert (await create(messages=MESSAGES, model="m")).choices[0].message.content == "Hello."
        assert (await create(messages=MESSAGES, model="m", extra_headers={"x-a": "b"})).choices
        endpoint.answer = busy_once
        assert (await create(messages=MESSAGES, model="m")).choices
        endpoint.answer = stream
        assert [chunk async for chunk in await create(messages=MESSAGES, model="m", stream=True)] == []
        endpoint.answer = good
        await client.close()


@pytest.mark.parametrize("name", ["http_proxy", "all_proxy"])
async def test_another_machine_is_asked_through_the_proxy(no_proxy_but, name):
    seen = []

    async def proxy(reader, writer):
        seen.append(await reader.readline())
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    no_proxy_but(name, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    client = client_of("http://somewhere.example")
    for more in WAYS.values():
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(messages=MESSAGES, model="m", **more)
    await client.close()
    assert seen == [b"POST http://somewhere.example/v1/chat/completions HTTP/1.1\r\n"] * 2
    server.close()


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("LOCALHOST.", True), ("a.localhost", True),
        ("::1", True), ("[::1]", True), ("10.0.0.1", False), ("localhost.example", False), ("", False), ("0x7f", False),
    ],
)  # fmt: skip
def test_which_addresses_are_this_machine(host, here):
    assert is_loopback(host) is here


MANY = """
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
    warnings.simplefilter("ignore", RuntimeWarning)

    async def main():
        client = model.openai_client()
        answers = await asyncio.gather(*(ask(client, **eval(sys.argv[4])) for _ in range(int(sys.argv[5]))))
        with open("/dev/null"):
            print(answers.count("Hello."))

    asyncio.run(main())
"""


@pytest.fixture
def slow_endpoint(endpoint):
    """The endpoint, which takes a moment for an answer and knows how many it was asked for at once."""
    endpoint.at_once = endpoint.most_at_once = 0

    async def answer(request, body):
        endpoint.at_once += 1
        endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
        await asyncio.sleep(0.3)
        endpoint.at_once -= 1
        return await endpoint.complete(request, body)

    endpoint.answer = answer
    return endpoint


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
async def test_requests_beyond_the_limit_of_open_files_wait(slow_endpoint, way):
    assert await run(MANY, slow_endpoint.url, 200, 200, WAYS[way], 600) == ["600"]
    assert 50 < slow_endpoint.most_at_once < 200


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
async def test_the_soft_limit_of_open_files_is_raised(many_files, slow_endpoint, way):
    assert await run(MANY, slow_endpoint.url, 100, 2000, WAYS[way], 600) == ["600"]
    assert slow_endpoint.most_at_once > 200


@pytest.mark.slow
async def test_that_files_are_short_is_said_once(slow_endpoint):
    code = MANY.replace('simplefilter("ignore"', 'simplefilter("default"').replace("import art", "")
    head = "import sys; sys.stderr = sys.stdout\n"
    said = " ".join(await run(head + textwrap.dedent(code), slow_endpoint.url, 100, 100, {}, 300))
    assert said.count("may have 100 files open at once") == 1
    assert "ulimit -n" in said
