"""The HTTP surface: vLLM's addresses and fields over the engine's thread.

Knows requests and answers, and hands work to the engine; it computes nothing. A client that goes away takes its
sequences along.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from art_engine_kit.event_stream import client_gone, has_key

from .api_answers import AnswerForm, ChunkWriter, whole_answer
from .api_errors import ApiError, bad_request
from .api_requests import ChatRequest, CompletionRequest, SamplingFields, parse
from .chat_prompt import PromptBuilder
from .detokenize import TextStream
from .engine import EngineStopped, InferenceEngineThread, UnknownAdapter
from .generation import GenerationRequest, SequenceUpdate
from .lora_batch import LoraAdapter
from .lora_files import AdapterMissing, AdapterRefused
from .prefix_cache import Tokens
from .sampling import SamplingSettings

CONTROL_TIMEOUT_S = 120.0
logger = logging.getLogger(__name__)
Handler = Callable[[Request], Awaitable[Response]]


class InferenceApp:
    """One served model. `prompts` gives the tokenizer once it is loaded; `api_key` None lets everyone in."""

    def __init__(
        self,
        engine: InferenceEngineThread,
        prompts: Callable[[], PromptBuilder],
        *,
        served_name: str,
        api_key: str | None,
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._served_name = served_name
        self._api_key = api_key
        # One thread for templates and tokenizers: long prompts would hold the event loop up.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="art-torch-tokenize")
        guarded = self._guarded
        self.asgi = Starlette(
            routes=[
                Route("/health", self._health, methods=["GET"]),
                Route("/v1/models", guarded(self._models), methods=["GET"]),
                Route("/v1/chat/completions", guarded(self._chat), methods=["POST"]),
                Route("/v1/completions", guarded(self._completions), methods=["POST"]),
                Route("/v1/load_lora_adapter", guarded(self._load), methods=["POST"]),
                Route("/v1/unload_lora_adapter", guarded(self._unload), methods=["POST"]),
                Route("/pause", guarded(self._pause), methods=["POST"]),
                Route("/resume", guarded(self._resume), methods=["POST"]),
                Route("/is_paused", guarded(self._is_paused), methods=["GET"]),
                Route("/sleep", guarded(self._sleep), methods=["POST"]),
                Route("/wake_up", guarded(self._wake), methods=["POST"]),
                Route("/stats", guarded(self._stats), methods=["GET"]),
            ],
            exception_handlers={404: _no_such_address, 405: _no_such_address},
        )

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                if not self._engine.ready:
                    raise ApiError(503, "The server is not ready: the model is loading, or the engine has ended.")
                return await handler(request)
            except ApiError as error:
                return _json(error.body(), error.status)
            except EngineStopped as error:
                return _json(ApiError(503, str(error)).body(), 503)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                logger.exception("%s %s failed.", request.method, request.url.path)
                return _json(ApiError(500, f"{type(error).__name__}: {error}").body(), 500)

        return guarded

    def _check_key(self, request: Request) -> None:
        if self._api_key is not None and not has_key(request.scope, self._api_key):
            raise ApiError(
                401, "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'.", code="invalid_api_key"
            )

    async def _health(self, _: Request) -> Response:
        return Response(status_code=200 if self._engine.ready else 503)

    async def _models(self, _: Request) -> Response:
        max_len = self._engine.scheduler.limits.max_len
        common = {"object": "model", "created": 0, "owned_by": "art-engine-torch"}
        base = {"id": self._served_name, **common, "root": self._served_name, "parent": None, "max_model_len": max_len}
        adapters = [
            {"id": name, **common, "root": self._engine.adapter(name).path, "parent": self._served_name}
            for name in self._engine.adapter_names()
        ]
        return _json({"object": "list", "data": [base, *adapters]})

    async def _chat(self, request: Request) -> Response:
        asked = parse(ChatRequest, await _body(request))
        adapter = self._adapter(asked.model)
        prompt = await self._tokenize(lambda: self._prompts().from_messages(asked))
        limit = asked.max_completion_tokens or asked.max_tokens
        top = (asked.top_logprobs or 0) if asked.logprobs else 0
        form = self._form(asked, "chat", [prompt], want_logprobs=bool(asked.logprobs))
        return await self._generate(request, asked, form, [prompt], adapter, limit, top)

    async def _completions(self, request: Request) -> Response:
        asked = parse(CompletionRequest, await _body(request))
        adapter = self._adapter(asked.model)

        def tokenize() -> list[Tokens]:
            builder, special = self._prompts(), asked.add_special_tokens
            return [builder.from_prompt(prompt, add_special_tokens=special) for prompt in asked.prompts()]

        prompts = await self._tokenize(tokenize)
        form = self._form(asked, "text", prompts, want_logprobs=asked.logprobs is not None)
        return await self._generate(request, asked, form, prompts, adapter, asked.max_tokens, asked.logprobs or 0)

    def _adapter(self, model: str) -> LoraAdapter | None:
        if model == self._served_name:
            return None
        try:
            return self._engine.adapter(model)
        except UnknownAdapter:
            there = ", ".join([self._served_name, *self._engine.adapter_names()])
            raise ApiError(
                404, f"The model {model!r} does not exist. There is: {there}.", param="model", code="model_not_found"
            ) from None

    async def _tokenize(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)

    def _form(self, asked: SamplingFields, kind: Any, prompts: list[Tokens], *, want_logprobs: bool) -> AnswerForm:
        builder = self._prompts()
        return AnswerForm(
            kind=kind,
            model=asked.model,
            prompts=[prompt.tolist() for prompt in prompts],
            samples=asked.n,
            want_logprobs=want_logprobs,
            want_token_ids=bool(asked.return_token_ids),
            parse_tools=isinstance(asked, ChatRequest) and asked.parse_tools,
            include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
            token_text=builder.token_text,
            decode=lambda ids: str(builder.tokenizer.decode(ids, skip_special_tokens=True)),
            end_ids=frozenset() if asked.ignore_eos else builder.end_ids,
            stop_ids=frozenset(asked.stop_token_ids or ()),
        )

    async def _generate(
        self,
        request: Request,
        asked: SamplingFields,
        form: AnswerForm,
        prompts: list[Tokens],
        adapter: LoraAdapter | None,
        max_tokens: int | None,
        top_logprobs: int,
    ) -> Response:
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[tuple[int, SequenceUpdate]] = asyncio.Queue()
        tokenizer: Any = self._prompts().tokenizer
        stops, include_stop = asked.stops, asked.include_stop_str_in_output
        requests = []
        for number, prompt in enumerate(prompts):
            base = number * asked.n

            def listen(update: SequenceUpdate, base: int = base) -> None:
                loop.call_soon_threadsafe(news.put_nowait, (base + update.index, update))

            requests.append(
                GenerationRequest(
                    prompt=prompt,
                    adapter=adapter,
                    samples=_samples(asked, top_logprobs, number),
                    max_tokens=self._room(len(prompt), max_tokens),
                    listener=listen,
                    end_ids=form.end_ids,
                    stop_ids=form.stop_ids,
                    streaming=asked.stream,
                    text=(lambda: TextStream(tokenizer, stops, include_stop=include_stop))
                    if asked.stream or stops
                    else None,
                )
            )
        for generation in requests:
            self._engine.submit(generation)
        if asked.stream:
            return StreamingResponse(self._stream(form, requests, news), media_type="text/event-stream")
        return _json(whole_answer(form, await self._collect(request, form, requests, news)))

    def _room(self, prompt: int, max_tokens: int | None) -> int:
        limit = self._engine.scheduler.limits.max_len
        if prompt >= limit:
            raise bad_request(
                f"This model's context is {limit} tokens; the prompt alone has {prompt}. Shorten it.",
                "messages",
                "context_length_exceeded",
            )
        if max_tokens is not None and prompt + max_tokens > limit:
            raise bad_request(
                f"This model's context is {limit} tokens; the prompt has {prompt} and max_tokens asks for {max_tokens} "
                f"more, {prompt + max_tokens} together. Shorten the prompt or ask for at most {limit - prompt}.",
                "max_tokens",
                "context_length_exceeded",
            )
        return max_tokens or limit - prompt

    async def _collect(
        self,
        request: Request,
        form: AnswerForm,
        requests: list[GenerationRequest],
        news: asyncio.Queue[tuple[int, SequenceUpdate]],
    ) -> list[SequenceUpdate]:
        results: dict[int, SequenceUpdate] = {}
        gone = asyncio.ensure_future(client_gone(request.receive))
        try:
            while len(results) < len(form.prompts) * form.samples:
                following = asyncio.ensure_future(news.get())
                await asyncio.wait({following, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    following.cancel()
                    raise ClientDisconnect
                index, update = following.result()
                if update.finished == "error":
                    raise ApiError(500, f"Generation failed: {update.reason}.", code="generation_failed")
                results[index] = update
        finally:
            gone.cancel()
            if len(results) < len(form.prompts) * form.samples:
                for generation in requests:
                    self._engine.cancel(generation)
        return [results[index] for index in sorted(results)]

    async def _stream(
        self,
        form: AnswerForm,
        requests: list[GenerationRequest],
        news: asyncio.Queue[tuple[int, SequenceUpdate]],
    ) -> AsyncIterator[bytes]:
        writer = ChunkWriter(form)
        left = len(form.prompts) * form.samples
        try:
            while left:
                index, update = await news.get()
                if update.finished == "error":
                    error = ApiError(500, f"Generation failed: {update.reason}.", code="generation_failed")
                    yield _event(error.body())
                    return
                left -= update.finished is not None
                for chunk in writer.chunks(index, update):
                    yield _event(chunk)
            usage = writer.usage()
            if usage is not None:
                yield _event(usage)
            yield b"data: [DONE]\n\n"
        finally:
            if left:  # the client went away, or one sample failed
                for generation in requests:
                    self._engine.cancel(generation)

    async def _load(self, request: Request) -> Response:
        body = await _body(request)
        name, path = _text_field(body, "lora_name"), _text_field(body, "lora_path")
        if body.get("load_inplace"):
            raise bad_request("load_inplace would change requests under way; load under a new name.", "load_inplace")
        try:
            await asyncio.to_thread(self._engine.load_adapter, name, Path(path))
        except AdapterMissing as error:
            raise ApiError(404, str(error), param="lora_path", code="adapter_missing") from None
        except AdapterRefused as error:
            raise bad_request(str(error), "lora_path", "adapter_refused") from None
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added.")

    async def _unload(self, request: Request) -> Response:
        name = _text_field(await _body(request), "lora_name")
        try:
            self._engine.unload_adapter(name)
        except UnknownAdapter:
            there = ", ".join(self._engine.adapter_names()) or "none"
            raise ApiError(404, f"No adapter {name!r} is loaded. Loaded: {there}.", param="lora_name") from None
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed.")

    async def _pause(self, request: Request) -> Response:
        body = await _body(request, optional=True)
        mode = request.query_params.get("mode") or body.get("mode") or "keep"
        if mode not in ("keep", "abort"):
            raise bad_request(f"mode={mode!r} is not supported; use 'keep' or 'abort'.", "mode")
        await _done(self._engine.pause(abort=mode == "abort"))
        return _json({"status": "paused"})

    async def _resume(self, _: Request) -> Response:
        await _done(self._engine.resume())
        return _json({"status": "paused" if self._engine.paused else "resumed"})

    async def _is_paused(self, _: Request) -> Response:
        return _json({"is_paused": self._engine.paused})

    async def _sleep(self, _: Request) -> Response:
        await _done(self._engine.sleep())
        return _json({"status": "asleep"})

    async def _wake(self, _: Request) -> Response:
        await _done(self._engine.wake())
        return _json({"status": "awake"})

    async def _stats(self, _: Request) -> Response:
        return _json(self._engine.statistics())


def _samples(asked: SamplingFields, top_logprobs: int, prompt: int) -> list[SamplingSettings]:
    """The settings of each sample. With a seed, sample i of prompt p is the same in every run; without one, in none."""
    top_k = asked.top_k or 0
    return [
        SamplingSettings(
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            top_k=max(top_k, 0),
            top_logprobs=top_logprobs,
            seed=secrets.randbits(64) if asked.seed is None else hash((asked.seed, prompt, number)),
        )
        for number in range(asked.n)
    ]


async def _body(request: Request, *, optional: bool = False) -> dict[str, Any]:
    raw = await request.body()
    if optional and not raw:
        return {}
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"The body is not JSON: {error}.") from None
    if not isinstance(body, dict):
        raise bad_request("The body must be a JSON object.")
    return body


def _text_field(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise bad_request(f"{name} must be a non-empty string.", name)
    return value


async def _done(future: Any) -> None:
    try:
        await asyncio.wait_for(asyncio.wrap_future(future), CONTROL_TIMEOUT_S)
    except TimeoutError:
        raise ApiError(503, f"The engine did not get to this within {CONTROL_TIMEOUT_S:.0f} s.") from None


async def _no_such_address(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return _json(ApiError(status, f"There is no {request.method} {request.url.path} on this server.").body(), status)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
