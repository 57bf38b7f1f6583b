"""The OpenAI client: what it sends, what comes back, how it fails. Runs with openai 2.x and 3.x alike."""

import asyncio
import gc
import json
import shutil
import ssl
import subprocess
import sys
import textwrap
import warnings

import openai
import pytest
from aiohttp import web
from openai.types.chat import ChatCompletion

import art
from art_core.errors import NotRegistered

MESSAGES = [{"role": "user", "content": "Hello? ünï"}]


@pytest.fixture
def client(endpoint):
    model = art.Model(name="m", project="p", inference_base_url=f"{endpoint.url}/v1", inference_api_key="sk-secret")
    return model.openai_client()


async def test_a_choice_carries_tokens_logprobs_and_version(model, endpoint):
    completion = await model.openai_client().chat.completions.create(messages=MESSAGES, model=model.name)
    assert isinstance(completion, ChatCompletion)
    assert completion.model == "agent-001@3"
    assert completion._request_id == "req-1"
    (choice,) = completion.choices
    assert choice.message.content == "Hello."
    assert choice.token_ids == [5, 6]
    assert choice.prompt_token_ids == [1, 2, 3]
    assert choice.policy_version == 3
    assert [token.logprob for token in choice.logprobs.content] == [-0.5, -0.5]
    assert endpoint.headers[0]["Authorization"] == "Bearer sk-memory"


async def test_nothing_is_added_to_a_request(client, endpoint):
    await client.chat.completions.create(messages=MESSAGES, model="gpt", temperature=0.5, n=2, user=openai.NOT_GIVEN)
    assert endpoint.requests == [{"messages": MESSAGES, "model": "gpt", "temperature": 0.5, "n": 2}]


async def test_the_short_way_and_the_package_agree(client, endpoint):
    """The same call with an extra header goes the package's own way."""
    short = await client.chat.completions.create(messages=MESSAGES, model="gpt", n=2, extra_body={"top_k": 4})
    package = await client.chat.completions.create(
        messages=MESSAGES, model="gpt", n=2, extra_body={"top_k": 4}, extra_headers={"x-mine": "1"}
    )
    assert short == package
    assert short.model_dump() == package.model_dump()
    assert endpoint.requests[0] == endpoint.requests[1]
    ours, theirs = ({k.lower(): v for k, v in headers.items()} for headers in endpoint.headers)
    differ = {"x-mine", "accept-encoding", "connection", "x-stainless-retry-count", "x-stainless-read-timeout"}
    assert {k: v for k, v in ours.items() if k not in differ} == {k: v for k, v in theirs.items() if k not in differ}


async def test_arguments_that_are_not_plain_json_go_the_packages_way(client, endpoint):
    first = await client.chat.completions.create(messages=MESSAGES, model="gpt")
    await client.chat.completions.create(messages=(m for m in [*MESSAGES, first.choices[0].message]), model="gpt")
    assert endpoint.requests[-1]["messages"][1]["content"] == "Hello."
    await client.chat.completions.create(messages=[*MESSAGES, first.choices[0].message], model="gpt")
    assert endpoint.requests[-1]["messages"][1]["content"] == "Hello."
    with pytest.raises(TypeError, match="nonsense"):
        await client.chat.completions.create(messages=MESSAGES, model="gpt", nonsense=1)
    with pytest.raises(TypeError, match="messages"):
        await client.chat.completions.create(model="gpt")


@pytest.mark.parametrize("way", ["short", "the package's", "stream", "copy"])
async def test_a_first_request_that_waits_is_told_once(client, endpoint, monkeypatch, way):
    monkeypatch.setattr("art.first_answer.SAY_AFTER_S", 0.05)
    good, held = endpoint.answer, asyncio.Event()

    async def answer(request, body):
        await held.wait()
        return await good(request, {**body, "stream": False})

    endpoint.answer = answer
    asked = client.with_options(max_retries=1) if way == "copy" else client
    extra = {"the package's": {"extra_headers": {"x-mine": "1"}}, "stream": {"stream": True}}.get(way, {})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RuntimeWarning)
        waiting = [
            asyncio.create_task(asked.chat.completions.create(messages=MESSAGES, model="gpt", **extra)) for _ in "ab"
        ]
        while not said:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        held.set()
        await asyncio.gather(*waiting)
        held.clear()
        third = asyncio.create_task(client.chat.completions.create(messages=MESSAGES, model="gpt"))
        await asyncio.sleep(0.1)
        held.set()
        await third
    (words,) = [str(warning.message) for warning in said if warning.category is RuntimeWarning]
    assert words.startswith(f"{endpoint.url}/v1/ has not answered its first request, for model 'gpt', in 0.05 s")
    assert "given up after 1200 s" in words


async def test_streams(client, endpoint):
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt"}

    async def answer(request, body):
        assert body["stream"] is True
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for word in ("one ", "two"):
            choices = [{"index": 0, "delta": {"content": word}, "finish_reason": None, "token_ids": [9]}]
            await response.write(f"data: {json.dumps({**chunk, 'choices': choices})}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    endpoint.answer = answer
    stream = await client.chat.completions.create(messages=MESSAGES, model="gpt", stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content for c in chunks) == "one two"
    assert chunks[0].choices[0].token_ids == [9]


async def test_raw_responses_work(client):
    raw = await client.chat.completions.with_raw_response.create(messages=MESSAGES, model="gpt")
    assert raw.headers["x-request-id"] == "req-1"
    assert raw.parse().choices[0].message.content == "Hello."


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, openai.BadRequestError), (401, openai.AuthenticationError), (404, openai.NotFoundError)],
)
async def test_a_refusal_is_raised_after_one_request(client, endpoint, status, error):
    async def answer(request, body):
        return web.json_response(
            {"error": {"message": "no such model; there are: a, b", "code": "nope"}}, status=status
        )

    endpoint.answer = answer
    with pytest.raises(error, match="there are: a, b") as raised:
        await client.chat.completions.create(messages=MESSAGES, model="gpt")
    assert raised.value.status_code == status
    assert raised.value.code == "nope"
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("kind", ["503", "dropped", "not http"])
async def test_a_passing_failure_is_tried_again(client, endpoint, kind):
    good = endpoint.answer

    async def answer(request, body):
        endpoint.answer = good
        if kind == "503":
            return web.Response(status=503, headers={"retry-after-ms": "1"})
        if kind == "not http":
            request.transport.write(b"garbage\r\n\r\n")
        request.transport.close()
        return web.Response()

    endpoint.answer = answer
    completion = await client.chat.completions.create(messages=MESSAGES, model="gpt")
    assert completion.choices[0].message.content == "Hello."
    assert len(endpoint.requests) == 2


async def test_a_lasting_failure_is_tried_as_often_as_the_package_would(client, endpoint):
    async def answer(request, body):
        return web.Response(status=500, headers={"retry-after-ms": "1"})

    endpoint.answer = answer
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(messages=MESSAGES, model="gpt")
    assert len(endpoint.requests) == 1 + client.max_retries
    endpoint.requests.clear()
    with pytest.raises(openai.InternalServerError):
        await client.with_options(max_retries=0).chat.completions.create(messages=MESSAGES, model="gpt")
    assert len(endpoint.requests) == 1


async def test_nobody_listening(unused_tcp_port):
    model = art.Model(
        name="m", project="p", inference_base_url=f"http://127.0.0.1:{unused_tcp_port}/v1", inference_api_key="k"
    )
    client = model.openai_client().with_options(max_retries=1)
    with pytest.raises(openai.APIConnectionError):
        await client.chat.completions.create(messages=MESSAGES, model="gpt")


async def test_the_limits_of_a_request(client, endpoint):
    assert (client.timeout.read, client.timeout.connect) == (1200, 5)

    async def answer(request, body):
        await asyncio.sleep(30)

    endpoint.answer = answer
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=0.1, max_retries=1).chat.completions.create(messages=MESSAGES, model="gpt")
    assert len(endpoint.requests) == 2


async def test_an_answer_the_package_would_not_know_is_read_all_the_same(client, endpoint):
    async def answer(request, body):
        return web.json_response(
            {
                "id": "x",
                "choices": [
                    {"index": 0, "finish_reason": "abort", "message": {"role": "assistant", "content": "so far"}}
                ],
            }
        )

    endpoint.answer = answer
    completion = await client.chat.completions.create(messages=MESSAGES, model="gpt")
    assert completion.choices[0].finish_reason == "abort"
    assert completion.choices[0].message.content == "so far"


@pytest.mark.parametrize("text", ["<html>login</html>", "[1]", "3"])
async def test_an_answer_that_is_no_completion(client, endpoint, text):
    async def answer(request, body):
        return web.Response(text=text)

    endpoint.answer = answer
    with pytest.raises(openai.APIConnectionError, match="is no chat completion"):
        await client.chat.completions.create(messages=MESSAGES, model="gpt")


async def test_a_key_from_a_function(client, endpoint):
    async def key():
        return "sk-fresh"

    await client.with_options(api_key=key).chat.completions.create(messages=MESSAGES, model="gpt")
    assert endpoint.headers[0]["Authorization"] == "Bearer sk-fresh"


async def test_a_busy_server_is_given_the_time_it_asks_for(client, endpoint, monkeypatch):
    good, waits, sleep = endpoint.answer, [], asyncio.sleep

    async def answer(request, body):
        endpoint.answer = good
        return web.Response(status=429, headers={"retry-after": "7"})

    async def note(seconds, *rest):
        waits.append(seconds)
        await sleep(0, *rest)

    endpoint.answer = answer
    monkeypatch.setattr("art.openai_client.asyncio.sleep", note)
    await client.chat.completions.create(messages=MESSAGES, model="gpt")
    assert 7.0 in waits
    assert len(endpoint.requests) == 2


async def test_answers_in_chunks_and_without_a_length(client, endpoint):
    whole = json.dumps({"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": []}).encode()

    async def chunked(request, body):
        response = web.StreamResponse(headers={"content-type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        for i in range(0, len(whole), 10):
            await response.write(whole[i : i + 10])
        return response

    async def until_the_end(request, body):
        request.transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n" + whole)
        request.transport.close()
        return web.Response()

    for answer in (chunked, until_the_end):
        endpoint.answer = answer
        assert (await client.chat.completions.create(messages=MESSAGES, model="gpt")).id == "x"
    assert len(endpoint.requests) == 2


async def test_connections_are_kept_and_shared_with_copies(client, endpoint):
    for _ in range(5):
        await client.chat.completions.create(messages=MESSAGES, model="gpt")
        await client.with_options(timeout=60).chat.completions.create(messages=MESSAGES, model="gpt")
    assert len(endpoint.connections) == 1


async def test_a_cancelled_request_gives_its_connection_up(client, endpoint):
    good, began = endpoint.answer, asyncio.Event()

    async def answer(request, body):
        began.set()
        await asyncio.sleep(30)

    endpoint.answer = answer
    task = asyncio.create_task(client.chat.completions.create(messages=MESSAGES, model="gpt"))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    endpoint.answer = good
    completion = await client.chat.completions.create(messages=MESSAGES, model="gpt")
    assert completion.choices[0].message.content == "Hello."
    assert len(endpoint.connections) == 2


@pytest.mark.slow
async def test_two_thousand_requests_at_once(many_files, client, endpoint):
    waiting, everyone = 0, asyncio.Event()

    async def answer(request, body):
        nonlocal waiting
        waiting += 1
        if waiting == 2000:
            everyone.set()
        await everyone.wait()
        return await endpoint.complete(request, body)

    endpoint.answer = answer
    done = await asyncio.gather(*(client.chat.completions.create(messages=MESSAGES, model="gpt") for _ in range(2000)))
    assert len(done) == 2000
    assert len(endpoint.connections) == 2000


async def test_the_client_is_cached(model, endpoint):
    client = model.openai_client()
    assert model.openai_client() is client
    model.inference_base_url = f"{endpoint.url}/other/v1"
    assert model.openai_client() is not client


async def test_what_is_missing_is_named():
    with pytest.raises(NotRegistered, match=r"await model\.register\(backend\)"):
        art.TrainableModel(name="m", project="p", base_model="b").openai_client()
    with pytest.raises(ValueError, match="no inference_base_url"):
        art.Model(name="m", project="p").openai_client()
    with pytest.raises(ValueError, match="no inference_api_key"):
        art.Model(name="m", project="p", inference_base_url="http://127.0.0.1:1/v1").openai_client()


@pytest.mark.slow
async def test_several_event_loops_and_no_leftovers(endpoint):
    """A script may call asyncio.run twice with one model; nothing is said about unclosed connections."""
    code = textwrap.dedent(f"""
        import asyncio, sys, warnings
        warnings.simplefilter("error")
        import art
        model = art.Model(name="m", project="p", inference_base_url="{endpoint.url}/v1", inference_api_key="k")
        client = model.openai_client()
        async def ask():
            client = model.openai_client()
            await client.chat.completions.create(messages=[{{"role": "user", "content": "x"}}], model="m")
            stream = client.chat.completions.create(messages=[], model="m", extra_headers={{"x-a": "b"}})
            print((await stream).choices[0].message.content)
        asyncio.run(ask())
        asyncio.run(ask())
        assert model.openai_client() is not client
    """)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await process.communicate()
    assert out.decode().split() == ["Hello.", "Hello."], err.decode()
    assert err.decode() == ""


async def test_closing_a_client_closes_its_connections(client, endpoint):
    await client.chat.completions.create(messages=MESSAGES, model="gpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        await client.close()
        del client
        gc.collect()
    (connection,) = endpoint.connections
    for _ in range(100):
        if connection.is_closing():
            break
        await asyncio.sleep(0.01)
    assert connection.is_closing()


async def test_an_https_endpoint_with_an_unknown_certificate_is_refused(endpoint):
    address = endpoint.url.replace("http://", "https://")
    model = art.Model(name="m", project="p", inference_base_url=f"{address}/v1", inference_api_key="k")
    with pytest.raises(openai.APIConnectionError):
        await model.openai_client().with_options(max_retries=1).chat.completions.create(messages=[], model="gpt")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
async def test_an_https_endpoint(tmp_path, monkeypatch):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *name]
    making = [*command, "-keyout", str(key), "-out", str(certificate)]
    await asyncio.to_thread(subprocess.run, making, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    connections = []
    body = b'{"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": []}'

    async def serve(reader, writer):
        connections.append(writer)
        while await reader.readline():
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    address = f"https://localhost:{server.sockets[0].getsockname()[1]}/v1"
    model = art.Model(name="m", project="p", inference_base_url=address, inference_api_key="k")
    for _ in range(2):
        completion = await model.openai_client().chat.completions.create(messages=[], model="m")
        assert completion.id == "x"
    assert len(connections) == 1
    await model.openai_client().close()
    server.close()
