"""What every answer of an inference server must look like, in the one form in which a client gets it.

Knows the types of the `openai` package, held strictly (a number in a string is no number), and the token ids and counts
that the one form adds. Knows no server; asks for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from openai.types import Completion, CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, Field

from .serving import JSON, merged, samples


class _Tokens(BaseModel):
    """What a choice of a whole answer has beside OpenAI's fields."""

    token_ids: list[int] = Field(min_length=1)
    prompt_token_ids: list[int] = Field(min_length=1)


class _ChunkTokens(BaseModel):
    """What a choice of a chunk has beside OpenAI's fields; an engine may give the ids at the end of a stream."""

    token_ids: list[int]
    prompt_token_ids: list[int] | None = None


class _ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model] = Field(min_length=1)


class _Error(BaseModel):
    """As OpenAI's, but for the code, which servers give as the number of the status too."""

    message: str = Field(min_length=10)
    type: str | None = None
    param: str | None = None
    code: str | int | None = None


def assert_chat_completion(body: JSON) -> None:
    """Fail unless a whole chat completion is of its schema, and its counts are those of its token ids."""
    ChatCompletion.model_validate(body, strict=True)
    _assert_tokens(body)


def assert_completion(body: JSON) -> None:
    """Fail unless a whole completion is of its schema, and its counts are those of its token ids."""
    Completion.model_validate(body, strict=True)
    _assert_tokens(body)
    for choice in body["choices"]:
        assert len(choice["logprobs"]["tokens"]) == len(choice["token_ids"]), "logprobs name other tokens"


def assert_chunks(chunks: Sequence[JSON]) -> None:
    """Fail unless the chunks of a streamed chat completion, which was asked for its usage, are of their schema."""
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        for choice in chunk["choices"]:
            _ChunkTokens.model_validate(choice, strict=True)
    found = merged(chunks)
    for sample in found:
        assert len(sample.logprobs) == len(sample.ids), f"{len(sample.ids)} token ids, {len(sample.logprobs)} logprobs"
        assert sample.finish_reason is not None, "a streamed choice never says why it ended"
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert usages, "no chunk has the usage that was asked for"
    _assert_usage(usages[-1], len(found[0].prompt_ids), sum(len(sample.ids) for sample in found))


def assert_models(body: Any) -> None:
    """Fail unless a list of models is of its schema."""
    _ModelList.model_validate(body, strict=True)


def assert_error(body: Any) -> None:
    """Fail unless an error can be read as the `openai` package does: from `error`, or from the body itself."""
    assert isinstance(body, dict), f"an error is no JSON object: {body!r}"
    _Error.model_validate(body.get("error", body), strict=True)


def _assert_tokens(body: JSON) -> None:
    for choice in body["choices"]:
        _Tokens.model_validate(choice, strict=True)
    found = samples(body)  # which has as many logprobs as token ids
    _assert_usage(body.get("usage"), len(found[0].prompt_ids), sum(len(sample.ids) for sample in found))


def _assert_usage(usage: Any, prompt: int, sampled: int) -> None:
    said = CompletionUsage.model_validate(usage, strict=True)
    counts = (said.prompt_tokens, said.completion_tokens, said.total_tokens)
    assert counts == (prompt, sampled, prompt + sampled), f"usage {counts} for {prompt} and {sampled} token ids"
