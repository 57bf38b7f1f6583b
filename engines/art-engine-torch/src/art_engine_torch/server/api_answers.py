"""Writes what was generated as OpenAI's JSON, whole or in chunks, with vLLM's fields for token ids.

Knows the shapes of answers and how tokens read. Nothing here waits or calls the engine.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from art_engine_kit.hermes_calls import ToolCallStream, parse_tool_calls

from .generation import FinishReason, SequenceUpdate, TopLogprobs
from .vocabulary import Vocabulary

Kind = Literal["chat", "text"]
JSON = dict[str, Any]


@dataclass(frozen=True)
class AnswerForm:
    """How one request wants to be answered. `prompts` holds the token ids of each of its prompts."""

    kind: Kind
    model: str
    prompts: list[list[int]]
    samples: int
    want_logprobs: bool
    want_token_ids: bool
    parse_tools: bool
    include_usage: bool
    vocabulary: Vocabulary
    end_ids: frozenset[int]
    stop_ids: frozenset[int]
    structured: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def envelope(self, *, chunk: bool) -> JSON:
        """What every object of this answer has in common."""
        prefix, kind = ("chatcmpl", "chat.completion") if self.kind == "chat" else ("cmpl", "text_completion")
        kind = f"{kind}.chunk" if chunk and self.kind == "chat" else kind
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def usage(self, completion_tokens: int) -> JSON:
        """Token counts. A prompt is counted once, however many samples were drawn from it."""
        prompt_tokens = sum(map(len, self.prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    def prompt_of(self, index: int) -> list[int]:
        """The prompt ids of choice `index`."""
        return self.prompts[index // self.samples]

    def logprobs(self, tokens: list[int], logprobs: list[float], top: list[TopLogprobs], offset: int) -> JSON | None:
        """In the endpoint's own form; `offset` is where the text of the first token begins."""
        if not self.want_logprobs:
            return None
        if self.kind == "chat":
            rows = zip(tokens, logprobs, top, strict=True)
            return {"content": [self._entry(t, lp) | {"top_logprobs": self._tops(tops)} for t, lp, tops in rows]}
        read = self.vocabulary.token_text
        texts = [read(token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        likeliest = [
            {read(t): lp for t, lp in tops} | {text: own} for text, own, tops in zip(texts, logprobs, top, strict=True)
        ]
        return {"text_offset": offsets, "token_logprobs": logprobs, "tokens": texts, "top_logprobs": likeliest}

    def _tops(self, tops: TopLogprobs) -> list[JSON]:
        return [self._entry(token, logprob) for token, logprob in tops]

    def _entry(self, token: int, logprob: float) -> JSON:
        known = self.vocabulary
        return {"token": known.token_text(token), "logprob": logprob, "bytes": known.token_bytes(token)}


def whole_answer(form: AnswerForm, results: list[SequenceUpdate]) -> JSON:
    """`results` has one finished update for each choice, in the choices' order."""
    body = form.envelope(chunk=False)
    body["choices"] = [_whole_choice(form, index, result) for index, result in enumerate(results)]
    body["usage"] = form.usage(sum(len(result.tokens) for result in results))
    if form.kind == "chat" and form.want_token_ids:
        body["prompt_token_ids"] = form.prompts[0]
    return body


def _whole_choice(form: AnswerForm, index: int, result: SequenceUpdate) -> JSON:
    text = result.text
    if text is None:
        shown = result.tokens
        if shown and result.finished == "stop" and shown[-1] in form.end_ids | form.stop_ids:
            shown = shown[:-1]
        text = form.vocabulary.text(shown)
    choice: JSON = {
        "index": index,
        "logprobs": form.logprobs(result.tokens, result.logprobs, result.top, 0),
        "finish_reason": result.finished,
        "stop_reason": result.reason,
    }
    if form.kind == "chat":
        message: JSON = {"role": "assistant", "content": text}
        if form.parse_tools:
            parsed = parse_tool_calls(text)
            message["content"] = parsed.text or (None if parsed.calls else "")
            if parsed.calls:
                message["tool_calls"] = parsed.calls
                choice["finish_reason"] = _with_calls(result.finished)
        choice["message"] = message
    else:
        choice["text"] = text
        if form.want_token_ids:
            choice["prompt_token_ids"] = form.prompt_of(index)
    if form.want_token_ids:
        choice["token_ids"] = result.tokens
    if form.structured:
        choice["allowed_logprob"] = result.allowed_logprob
    return choice


@dataclass
class _Streamed:
    """One choice under way: what it has not shown yet, and how far its text is."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[TopLogprobs] = field(default_factory=list)
    calls: ToolCallStream | None = None
    begun: bool = False
    offset: int = 0


class ChunkWriter:
    """Turns updates into chunks. Token ids of tokens that give no text yet go with the next chunk: none is lost."""

    def __init__(self, form: AnswerForm) -> None:
        self._form = form
        count = len(form.prompts) * form.samples
        self._choices = [_Streamed(calls=ToolCallStream() if form.parse_tools else None) for _ in range(count)]
        self._completion_tokens = 0

    def chunks(self, index: int, update: SequenceUpdate) -> Iterator[JSON]:
        """What to send for an update of choice `index`."""
        form, state = self._form, self._choices[index]
        state.tokens += update.tokens
        state.logprobs += update.logprobs
        state.top += update.top
        self._completion_tokens += len(update.tokens)
        first = not state.begun
        state.begun = True
        if first and form.kind == "chat":
            yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, first=True)
        text, calls = update.text or "", []
        if state.calls is not None:
            parts = [state.calls.push(text)]
            if update.finished is not None:
                parts.append(state.calls.flush())
            text = "".join(part.text for part in parts)
            calls = [call for part in parts for call in part.calls]
        if not text and not calls and update.finished is None:
            return
        finished: str | None = update.finished
        if state.calls is not None and state.calls.found:
            finished = _with_calls(update.finished)
        choice: JSON = {
            "logprobs": form.logprobs(state.tokens, state.logprobs, state.top, state.offset),
            "finish_reason": finished,
            "stop_reason": update.reason,
        }
        if form.want_token_ids:
            choice["token_ids"] = state.tokens
        if form.structured and update.finished is not None:
            choice["allowed_logprob"] = update.allowed_logprob
        state.offset += len(text)
        state.tokens, state.logprobs, state.top = [], [], []
        if form.kind == "text":
            yield self._chunk(index, {**choice, "text": text}, first=first)
            return
        delta: JSON = {"content": text} if text or not calls else {}
        if calls:
            delta["tool_calls"] = calls
        yield self._chunk(index, {**choice, "delta": delta}, first=False)

    def usage(self) -> JSON | None:
        """The last chunk, where it was asked for."""
        if not self._form.include_usage:
            return None
        return {**self._form.envelope(chunk=True), "choices": [], "usage": self._form.usage(self._completion_tokens)}

    def _chunk(self, index: int, choice: JSON, *, first: bool) -> JSON:
        form = self._form
        body = form.envelope(chunk=True)
        body["choices"] = [{"index": index, "finish_reason": None, "logprobs": None} | choice]
        if first and form.want_token_ids:
            # Where vLLM puts them: beside the choices in chat, inside the choice in completions.
            place = body if form.kind == "chat" else body["choices"][0]
            place["prompt_token_ids"] = form.prompt_of(index)
        if form.include_usage:
            body["usage"] = None
        return body


def _with_calls(finished: FinishReason | None) -> str | None:
    return "tool_calls" if finished == "stop" else finished
