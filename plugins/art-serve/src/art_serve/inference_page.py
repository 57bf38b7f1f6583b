"""What the OpenAPI page says of OpenAI's two addresses, which read their bodies and answer by themselves.

The fields are those that every engine behind the server takes; what an engine takes beyond them it judges itself, so
others are allowed here. Knows nothing of how a request is answered.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from art_backend_serverless import wire

from .answers import schema_of
from .artifact_names import ARTIFACT_PATTERN

_NAME = Annotated[
    str, Field(pattern=ARTIFACT_PATTERN, description="a model, or with :stepN behind it one of its steps")
]
_REFUSED = {
    400: "a field is wrong, or the engine can't do this; the message says which",
    401: "no key, or a wrong one",
    404: "there is no such model or step, or it is another entity's",
    408: "the body came too slowly",
    413: "the body is too large",
    422: "the engine takes the field in another form",
    429: "too much at once; Retry-After says when to come back",
    500: "the engine failed on this request",
    502: "the engine broke the answer off, or its answer can't be read",
    503: "the engine isn't there now; Retry-After says when to come back",
    504: "the engine gave no whole answer in time",
}


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Sampling(_Lenient):
    model: _NAME
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = None


class _Message(_Lenient):
    role: Literal["system", "user", "assistant"]
    content: str


class ChatCompletionRequest(_Sampling):
    """OpenAI's request for the next message of a conversation. Tools and their messages are taken too."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionRequest(_Sampling):
    """OpenAI's request for what follows a text, or token ids."""

    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[int], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class _Choice(_Lenient):
    index: int
    finish_reason: str | None
    token_ids: Annotated[list[int], Field(description="what was sampled, token by token")]
    prompt_token_ids: Annotated[list[int], Field(description="what it was sampled after")]
    policy_version: Annotated[int, Field(description="the step that sampled it")]


class _ChatChoice(_Choice):
    message: _Lenient


class _TextChoice(_Choice):
    text: str


class _Answer(_Lenient):
    id: str
    created: int
    model: Annotated[str, Field(description="the artifact name with the step that answered")]


class ChatCompletion(_Answer):
    """OpenAI's answer, with the exact tokens and the step that sampled them."""

    choices: list[_ChatChoice]


class Completion(_Answer):
    """OpenAI's answer, with the exact tokens and the step that sampled them."""

    choices: list[_TextChoice]


def inference_paths() -> dict[str, dict[str, Any]]:
    """The two addresses below the base URL, as `paths` of an OpenAPI document with the wire's components."""
    return {
        "/chat/completions": _path("create_chat_completion", ChatCompletionRequest, ChatCompletion),
        "/completions": _path("create_completion", CompletionRequest, Completion),
    }


def links_to_inference(model: str) -> dict[str, Any]:
    """Links of an answer that names a model to the requests that ask it; `model` is a template of its name."""
    operations = ("create_chat_completion", "create_completion")
    return {name: {"operationId": name, "requestBody": {"model": model}} for name in operations}


def _path(operation: str, request: type[BaseModel], answer: type[BaseModel]) -> dict[str, Any]:
    answered = {"application/json": {"schema": schema_of(answer)}, "text/event-stream": {"schema": {"type": "string"}}}
    error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{wire.Error.__name__}"}}}
    return {
        "post": {
            "tags": ["inference"],
            "summary": operation.replace("_", " ").title(),
            "description": request.__doc__,
            "operationId": operation,
            "security": [{"HTTPBearer": []}],
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema_of(request)}}},
            "responses": {
                "200": {"description": "whole, or with stream=true chunk by chunk", "content": answered},
                **{str(status): {"description": words, "content": error} for status, words in _REFUSED.items()},
            },
        }
    }
