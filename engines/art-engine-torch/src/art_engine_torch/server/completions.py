"""The way of a request for an answer: read, put into tokens, handed to the engine, written as it comes back.

Knows requests and answers, and hands work to the engine; it computes nothing. A client that goes away takes its
sequences along.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from art_engine_kit.event_stream import client_gone

from .api_answers import AnswerForm, ChunkWriter, Kind, whole_answer
from .api_bodies import event, json_response, read_body
from .api_errors import ApiError, bad_request, context_exceeded
from .api_requests import COLDEST, MOST_CHOICES, ChatRequest, CompletionRequest, SamplingFields, parse
from .api_structure import JsonObjectFormat, JsonSchemaFormat, forced_calls
from .detokenize import FirstCall, TextStream
from .engine import InferenceEngineThread, UnknownAdapter
from .generation import GenerationRequest, SequenceUpdate
from .logit_changes import LogitSettings
from .lora_batch import LoraAdapter
from .prefix_cache import Tokens
from .prompts import Prompts
from .sampling import SamplingSettings
from .structure import BadGrammar, Grammar, calls_rule, compile_grammar, json_rule
from .vocabulary import Vocabulary

News = asyncio.Queue[tuple[int, SequenceUpdate]]


class CompletionHandlers:
    """POST /v1/chat/completions and /v1/completions."""

    def __init__(
        self,
        engine: InferenceEngineThread,
        vocabulary: Callable[[], Vocabulary],
        prompts: Prompts,
        *,
        served_name: str,
    ) -> None:
        self._engine = engine
        self._vocabulary = vocabulary
        self._prompts = prompts
        self._served_name = served_name

    async def chat(self, request: Request) -> Response:
        """Answers messages."""
        asked = parse(ChatRequest, await read_body(request))
        adapter = self._adapter(asked.model)
        context = self._engine.scheduler.limits.max_len
        most = self._vocabulary().most_characters(context)
        prompt = await self._prompts.of_messages(asked, context=context, most=most)
        if not len(prompt):
            raise bad_request("messages: the prompt that they make has no tokens.", "messages")
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        limit = asked.max_completion_tokens or asked.max_tokens
        return await self._generate(request, asked, "chat", [prompt], adapter, limit, logprobs)

    async def complete(self, request: Request) -> Response:
        """Goes on with texts or token ids."""
        asked = parse(CompletionRequest, await read_body(request))
        adapter = self._adapter(asked.model)
        given = asked.prompts()
        if len(given) * asked.n > MOST_CHOICES:
            raise bad_request(f"prompt: {len(given)} prompts × n={asked.n} are more than {MOST_CHOICES}.", "prompt")
        prompts = await self._prompt_tokens(given, special=asked.add_special_tokens)
        return await self._generate(request, asked, "text", prompts, adapter, asked.max_tokens, asked.logprobs)

    async def _prompt_tokens(self, given: list[str | list[int]], *, special: bool) -> list[Tokens]:
        context = self._engine.scheduler.limits.max_len
        most = self._vocabulary().most_characters(context)
        texts = [prompt for prompt in given if isinstance(prompt, str)]
        written = iter(await self._prompts.of_texts(texts, special=special, context=context, most=most))
        prompts = [next(written) if isinstance(prompt, str) else self._known(prompt) for prompt in given]
        if not all(map(len, prompts)):
            raise bad_request("The prompt has no tokens.", "prompt")
        return prompts

    def _known(self, ids: list[int]) -> Tokens:
        size = self._vocabulary().size
        outside = [token for token in ids if not 0 <= token < size]
        if outside:
            raise bad_request(f"Token id {outside[0]} is outside the vocabulary of {size}.", "prompt")
        return np.array(ids, dtype=np.int32)

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

    def _form(
        self, asked: SamplingFields, kind: Kind, prompts: list[Tokens], *, want_logprobs: bool, structured: bool
    ) -> AnswerForm:
        vocabulary = self._vocabulary()
        return AnswerForm(
            kind=kind,
            model=asked.model,
            prompts=[prompt.tolist() for prompt in prompts],
            samples=asked.n,
            want_logprobs=want_logprobs,
            want_token_ids=bool(asked.return_token_ids),
            parse_tools=isinstance(asked, ChatRequest) and asked.parse_tools,
            include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
            vocabulary=vocabulary,
            end_ids=frozenset() if asked.ignore_eos else vocabulary.end_ids,
            stop_ids=frozenset(asked.stop_token_ids or ()),
            structured=structured,
        )

    async def _generate(
        self,
        request: Request,
        asked: SamplingFields,
        kind: Kind,
        prompts: list[Tokens],
        adapter: LoraAdapter | None,
        max_tokens: int | None,
        logprobs: int | None,
    ) -> Response:
        """Answers with as many of the likeliest tokens beside each as `logprobs` says, and no logprobs for None."""
        loop = asyncio.get_running_loop()
        news: News = asyncio.Queue()
        vocabulary = self._vocabulary()
        changes = LogitSettings(
            asked.biases(vocabulary.size), asked.presence_penalty, asked.frequency_penalty, asked.repetition_penalty
        )
        grammar = await self._grammar(asked)
        form = self._form(asked, kind, prompts, want_logprobs=logprobs is not None, structured=grammar is not None)
        text = _text(asked, form, vocabulary)
        requests = []
        for number, prompt in enumerate(prompts):
            base = number * asked.n

            def listen(update: SequenceUpdate, base: int = base) -> None:
                loop.call_soon_threadsafe(news.put_nowait, (base + update.index, update))

            requests.append(
                GenerationRequest(
                    prompt=prompt,
                    adapter=adapter,
                    samples=_samples(asked, logprobs or 0, number, vocabulary.size),
                    max_tokens=self._room(len(prompt), max_tokens, "messages" if form.kind == "chat" else "prompt"),
                    listener=listen,
                    end_ids=form.end_ids,
                    stop_ids=form.stop_ids,
                    streaming=asked.stream,
                    text=text,
                    changes=changes,
                    guide=None if grammar is None else grammar.guide,
                )
            )
        for generation in requests:
            self._engine.submit(generation)
        if asked.stream:
            return StreamingResponse(self._stream(form, requests, news), media_type="text/event-stream")
        return json_response(whole_answer(form, await self._collect(request, form, requests, news)))

    async def _grammar(self, asked: SamplingFields) -> Grammar | None:
        """The grammar of the answer. Raises ApiError 400 for a schema that cannot be one."""
        rules, where = _rules(asked)
        if not rules:
            return None
        try:
            return await asyncio.to_thread(compile_grammar, self._vocabulary().guides, rules)
        except (BadGrammar, RecursionError, ValueError) as error:
            raise bad_request(f"{where}: no answer can be held to it: {error}.", where) from None

    def _room(self, prompt: int, max_tokens: int | None, param: str) -> int:
        limit = self._engine.scheduler.limits.max_len
        if prompt >= limit:
            raise context_exceeded(limit, f"the prompt alone has {prompt} tokens", param)
        if max_tokens is not None and prompt + max_tokens > limit:
            asked = f"you requested {prompt + max_tokens} tokens ({prompt} in the prompt, {max_tokens} for the answer)"
            raise context_exceeded(limit, f"{asked}, {limit - prompt} being left", "max_tokens")
        return max_tokens or limit - prompt

    async def _collect(
        self, request: Request, form: AnswerForm, requests: list[GenerationRequest], news: News
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

    async def _stream(self, form: AnswerForm, requests: list[GenerationRequest], news: News) -> AsyncIterator[bytes]:
        writer = ChunkWriter(form)
        left = len(form.prompts) * form.samples
        try:
            while left:
                index, update = await news.get()
                if update.finished == "error":
                    error = ApiError(500, f"Generation failed: {update.reason}.", code="generation_failed")
                    yield event(error.body())
                    return
                left -= update.finished is not None
                for chunk in writer.chunks(index, update):
                    yield event(chunk)
            usage = writer.usage()
            if usage is not None:
                yield event(usage)
            yield b"data: [DONE]\n\n"
        finally:
            if left:  # the client went away, or one sample failed
                for generation in requests:
                    self._engine.cancel(generation)


def _samples(asked: SamplingFields, top_logprobs: int, prompt: int, vocabulary: int) -> list[SamplingSettings]:
    """The settings of each sample. With a seed, sample i of prompt p is the same in every run; without one, in none."""
    return [
        SamplingSettings(
            temperature=0.0 if asked.temperature < COLDEST else asked.temperature,
            top_p=asked.top_p,
            top_k=min(max(asked.top_k, 0), vocabulary),
            min_p=asked.min_p,
            top_logprobs=min(top_logprobs, vocabulary),
            seed=secrets.randbits(64) if asked.seed is None else hash((asked.seed, prompt, number)),
        )
        for number in range(asked.n)
    ]


def _text(asked: SamplingFields, form: AnswerForm, vocabulary: Vocabulary) -> Callable[[], TextStream] | None:
    """What makes the text of a sample while it grows; None where the tokens' text is enough at the end."""
    one_call = form.parse_tools and isinstance(asked, ChatRequest) and not asked.parallel_tool_calls
    if not (asked.stream or asked.stops or one_call):
        return None
    tokenizer, stops, include = vocabulary.tokenizer, asked.stops, asked.include_stop_str_in_output
    return lambda: TextStream(tokenizer, stops, include_stop=include, until=FirstCall() if one_call else None)


def _rules(asked: SamplingFields) -> tuple[list[str], str]:
    """The rules of which an answer must follow one, none where it is free, and the field that asks for them."""
    rules, where = [], "response_format"
    if isinstance(asked, ChatRequest):
        forced = forced_calls(asked.tool_choice, asked.tools, parallel=asked.parallel_tool_calls)
        if forced is not None:
            return [calls_rule(forced.functions, several=forced.several)], "tools"
    match asked.response_format:
        case JsonObjectFormat():
            rules.append(json_rule({"type": "object"}, strict=True))
        case JsonSchemaFormat(json_schema=asked_schema):
            rules.append(json_rule(asked_schema.schema_, strict=bool(asked_schema.strict)))
            where = "response_format.json_schema.schema"
    if rules and isinstance(asked, ChatRequest) and asked.parse_tools:
        free = forced_calls("required", asked.tools, parallel=asked.parallel_tool_calls)
        assert free is not None
        rules.append(calls_rule(free.functions, several=free.several))
    return rules, where
