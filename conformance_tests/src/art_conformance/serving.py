"""A live inference server for the checks: an engine's launch plan run on this machine, and spoken to in its dialect.

Knows HTTP and processes, as a backend would; knows no engine. Holds no expectation: the checks do that.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from art_core import EngineCall, InferenceCapability, InferenceEngine, InferenceLaunch
from art_core.engines import Endpoint
from art_core.errors import EngineRefused
from art_engine_kit.event_stream import EventLines
from art_runtime import SupervisedProcess, free_port

JSON = dict[str, Any]
REQUEST_LIMIT_S = 120.0
# Of what must be caught in the middle of an answer.
TRIES = 30


@dataclass(frozen=True)
class Sample:
    """One choice in the one form: what was asked, what was sampled, and what the engine says of it."""

    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str | None
    choice: JSON = field(repr=False)


@dataclass
class LiveEngine:
    """A running server, its engine's dialect, and the adapters that it should hold and refused, with its reasons."""

    engine: InferenceEngine
    launch: InferenceLaunch
    process: SupervisedProcess
    client: httpx.AsyncClient
    refused: dict[str, EngineRefused] = field(default_factory=dict)

    async def control(self, call: EngineCall) -> bytes:
        """Make a control call. Raises EngineRefused when the dialect reads the answer as a refusal."""
        answer = await self.client.request(call.method, call.path, json=call.json, timeout=call.timeout_s)
        self.engine.check_answer(call, answer.status_code, answer.content)
        return answer.content

    async def load(self, adapter: str, folder: Path) -> None:
        """Load an adapter."""
        await self.control(self.engine.load_adapter(adapter, folder))

    async def unload(self, adapter: str) -> None:
        """Unload an adapter."""
        await self.control(self.engine.unload_adapter(adapter))

    async def adapters(self) -> frozenset[str]:
        """The adapters that the server says it holds."""
        return self.engine.read_adapters(await self.control(self.engine.list_adapters()))

    async def hold(self, adapters: Mapping[str, Path]) -> None:
        """Load those that aren't there. Whoever asks for one that is refused is told that reason."""
        try:
            there = await self.adapters()
        except EngineRefused:
            there = frozenset()
        self.refused.clear()
        for name, folder in adapters.items():
            if name not in there:
                try:
                    await self.load(name, folder)
                except EngineRefused as refusal:
                    self.refused[name] = refusal

    def prepared(self, endpoint: Endpoint, adapter: str | None, body: JSON) -> JSON:
        """A request of the dialect. Raises EngineRefused for an adapter that wasn't taken."""
        if adapter in self.refused:
            raise self.refused[adapter]
        return self.engine.prepare_request(endpoint, {"model": self.launch.served_name, **body}, adapter)

    async def post(self, path: str, body: JSON, **settings: Any) -> httpx.Response:
        """Send a body as it is, and give whatever comes back."""
        return await self.client.post(path, json=body, timeout=REQUEST_LIMIT_S, **settings)

    async def chat(self, adapter: str | None, **body: Any) -> list[Sample]:
        """Ask for a chat completion through the dialect, and give its choices."""
        prepared = self.prepared("chat/completions", adapter, body)
        answer = await self.post("/v1/chat/completions", prepared)
        assert answer.status_code == 200, f"HTTP {answer.status_code}: {answer.text[:1000]}"
        return samples(self.engine.read_response("chat/completions", answer.json()))

    async def begun(self, adapter: str | None, **body: Any) -> asyncio.Task[list[Sample]]:
        """Ask for a chat completion that is under way when this returns; gives the task that ends with its choices.

        The first tokens of a stream show that it is. An engine that declares no stream with token ids is only given a
        moment; whether the answer is still to come, the check must look in either case.
        """
        if InferenceCapability.STREAMING_TOKEN_IDS not in self.engine.capabilities:
            whole = asyncio.create_task(self.chat(adapter, **body))
            await asyncio.sleep(0.1)
            return whole
        first = asyncio.Event()
        task = asyncio.create_task(self.streamed(adapter, first, **body))
        seen = asyncio.create_task(first.wait())
        await asyncio.wait({task, seen}, timeout=REQUEST_LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
        seen.cancel()
        if task.done():
            task.result()
        return task

    async def streamed(self, adapter: str | None, first: asyncio.Event | None = None, **body: Any) -> list[Sample]:
        """Ask for a streamed chat completion, and give its choices put together; sets `first` at the first tokens."""
        chunks = []
        async for chunk in self.stream(adapter, **body):
            chunks.append(chunk)
            if first is not None and any(sample.text or sample.ids for sample in merged([chunk])):
                first.set()
        return merged(chunks)

    async def complete(self, adapter: str | None, **body: Any) -> list[Sample]:
        """Ask for a completion through the dialect, and give its choices."""
        prepared = self.prepared("completions", adapter, body)
        answer = await self.post("/v1/completions", prepared)
        assert answer.status_code == 200, f"HTTP {answer.status_code}: {answer.text[:1000]}"
        return samples(self.engine.read_response("completions", answer.json()))

    async def stream(self, adapter: str | None, **body: Any) -> AsyncIterator[JSON]:
        """Ask for a streamed chat completion, and give its chunks in the one form. Checks the framing of the stream."""
        prepared = self.prepared("chat/completions", adapter, {"stream": True, **body})
        path, limit = "/v1/chat/completions", REQUEST_LIMIT_S
        async with self.client.stream("POST", path, json=prepared, timeout=limit) as answer:
            assert answer.status_code == 200, f"HTTP {answer.status_code}: {(await answer.aread())[:1000]!r}"
            done = False
            async for line in event_lines(answer):
                if line.startswith(":"):
                    continue
                assert line.startswith("data:"), f"not a server-sent event: {line[:200]!r}"
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    done = True
                    continue
                yield self.engine.read_chunk("chat/completions", json.loads(data))
            assert done, "the stream ended without data: [DONE]"

    async def close(self) -> None:
        """Stop the server and close the connections."""
        await self.client.aclose()
        await self.process.stop()


@asynccontextmanager
async def in_mid_answer(
    ask: Callable[[], Awaitable[list[asyncio.Task[list[Sample]]]]],
    act: Callable[[], Awaitable[object]] | None = None,
    *,
    undo: Callable[[], Awaitable[object]] | None = None,
    needed: Callable[[Iterable[bool]], bool],
    problem: str,
) -> AsyncIterator[list[asyncio.Task[list[Sample]]]]:
    """Give the requests that `ask` begins once `act` is done and they, all or any as `needed`, are still under way.

    The tiny model ends some by chance, and a server with little time may send nothing until an answer is whole: then
    `undo` what was done and try again, TRIES times in all. Raises AssertionError with the `problem` after that. Those
    still under way at the end of the block are cancelled.
    """
    for _ in range(TRIES):
        asked = await ask()
        try:
            if act is not None:
                await act()
            if needed(not task.done() for task in asked):
                yield asked
                return
            await gather_limited(*asked)
        finally:
            for task in asked:
                task.cancel()
        if undo is not None:
            await undo()
    raise AssertionError(f"{problem}: it shows nothing")


async def event_lines(answer: httpx.Response) -> AsyncIterator[str]:
    """The lines of a streamed answer that aren't empty.

    A line ends at a line feed and nowhere else: httpx's own reading ends it at U+2028 and U+0085 too, which JSON may
    hold as they are.
    """
    async for line in EventLines(_with_last_end(answer.aiter_bytes())):
        yield line.decode()


async def _with_last_end(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for piece in pieces:
        yield piece
    yield b"\n"


def merged(chunks: Iterable[JSON]) -> list[Sample]:
    """The choices of a streamed chat completion, put together from chunks in the one form."""
    found: dict[int, Sample] = {}
    for chunk in chunks:
        for choice in chunk.get("choices", ()):
            index = int(choice.get("index", 0))
            found[index] = _with_chunk(found.get(index), choice)
    return [found[index] for index in sorted(found)]


def _with_chunk(before: Sample | None, choice: JSON) -> Sample:
    """A choice of which one more chunk has come. Its `choice` is the latest chunk."""
    had = before or Sample([], [], [], "", None, {})
    return Sample(
        prompt_ids=choice.get("prompt_token_ids") or had.prompt_ids,
        ids=had.ids + [int(token) for token in choice.get("token_ids") or ()],
        logprobs=had.logprobs
        + [float(entry["logprob"]) for entry in (choice.get("logprobs") or {}).get("content") or ()],
        text=had.text + ((choice.get("delta") or {}).get("content") or ""),
        finish_reason=choice.get("finish_reason") or had.finish_reason,
        choice=choice,
    )


def samples(body: JSON) -> list[Sample]:
    """Read an answer in the one form. Raises AssertionError saying which part of the form is missing."""
    found = []
    for choice in sorted(body["choices"], key=lambda choice: int(choice.get("index", 0))):
        for key in ("token_ids", "prompt_token_ids", "logprobs"):
            assert choice.get(key) is not None, f"a choice lacks {key}: {json.dumps(choice)[:500]}"
        logprobs = read_logprobs(choice["logprobs"])
        ids = [int(token) for token in choice["token_ids"]]
        assert len(ids) == len(logprobs), f"{len(ids)} token ids and {len(logprobs)} logprobs in one choice"
        text = choice["message"].get("content") or "" if "message" in choice else choice["text"]
        prompt = [int(token) for token in choice["prompt_token_ids"]]
        found.append(Sample(prompt, ids, logprobs, text, choice.get("finish_reason"), choice))
    return found


def read_logprobs(logprobs: Mapping[str, Any]) -> list[float]:
    """The logprobs of the sampled tokens, from the form of chat or that of completions."""
    content = logprobs.get("content")
    if content is not None:
        return [float(entry["logprob"]) for entry in content]
    return [float(value) for value in logprobs["token_logprobs"]]


@asynccontextmanager
async def serving(
    engine: InferenceEngine, launch: InferenceLaunch, log_file: Path, *, stop: bool = True
) -> AsyncIterator[LiveEngine]:
    """Run an engine's launch plan until the block is left."""
    live = await start_engine(engine, launch, log_file)
    try:
        yield live
    finally:
        if stop:
            await live.close()


async def start_engine(engine: InferenceEngine, launch: InferenceLaunch, log_file: Path) -> LiveEngine:
    """Run an engine's launch plan and wait until it is ready. Raises ProcessFailed with the end of its log."""
    process = await SupervisedProcess.start(
        engine.launch(launch), port=launch.port, log_file=log_file, name=f"inference engine {engine.name}"
    )
    return LiveEngine(engine, launch, process, client_of(launch))


def client_of(launch: InferenceLaunch) -> httpx.AsyncClient:
    """A client of a server, with connections of its own."""
    return httpx.AsyncClient(
        base_url=f"http://{launch.host}:{launch.port}",
        headers={"Authorization": f"Bearer {launch.api_key}"},
        limits=httpx.Limits(max_connections=None),
        timeout=REQUEST_LIMIT_S,
        trust_env=False,
    )


def port_for_a_server() -> int:
    """A free port on the loopback interface."""
    return free_port()


async def gather_limited(*work: Any, limit_s: float = REQUEST_LIMIT_S) -> list[Any]:
    """Run things at once, all of them within `limit_s`."""
    async with asyncio.timeout(limit_s):
        return list(await asyncio.gather(*work))
