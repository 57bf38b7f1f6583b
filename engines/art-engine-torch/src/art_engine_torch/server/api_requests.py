"""What clients may send to the two generation endpoints, checked field by field.

A field that would change the answer and isn't implemented is refused by name, never ignored. Knows shapes of JSON and
limits of values; templates, token ids and the engine are elsewhere.
"""

from __future__ import annotations

import difflib
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .api_errors import bad_request

# OpenAI's and vLLM's fields that change nothing here: bookkeeping, or hints to services that this server is not.
HARMLESS: Final = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "cache_salt",
        "priority",
    ]
)
# Fields that do nothing at these values and would change the answer at others.
ONLY: Final[dict[str, tuple[Any, ...]]] = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "repetition_penalty": (1, None),
    "logit_bias": ({}, None),
    "min_p": (0, None),
    "min_tokens": (0, None),
    "use_beam_search": (False, None),
    "length_penalty": (1, None),
    "best_of": (1, None),
    "echo": (False, None),
    "suffix": ("", None),
    "response_format": ({"type": "text"}, None),
    "prompt_logprobs": (None,),
    "truncate_prompt_tokens": (None,),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "bad_words": ([], None),
    "allowed_token_ids": (None,),
    "logits_processors": (None,),
    "functions": ([], None),
    "function_call": ("none", None),
    "audio": (None,),
    "modalities": (["text"], None),
    "prediction": (None,),
    "documents": ([], None),
    "parallel_tool_calls": (True, None),
    "skip_special_tokens": (True, None),
    "spaces_between_special_tokens": (True, None),
    "return_tokens_as_token_ids": (False, None),
}


class StreamOptions(BaseModel):
    """`include_usage` asks for one last chunk with the token counts."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False


class SamplingFields(BaseModel):
    """What both endpoints share. Limits of values are OpenAI's and vLLM's."""

    model_config = ConfigDict(extra="allow")

    model: str
    n: int = Field(default=1, ge=1, le=1024)
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    temperature: float | None = Field(default=None, ge=0.0, le=100.0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        return [stop for stop in stops if stop]


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False

    @property
    def parse_tools(self) -> bool:
        """Whether tool calls are looked for in the answer."""
        return bool(self.tools) and self.tool_choice != "none"


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    add_special_tokens: bool = True

    def prompts(self) -> list[str | list[int]]:
        """One entry for each prompt of the batch."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise bad_request("prompt is empty; send a string, token ids, or a list of either.", "prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


R = TypeVar("R", bound=SamplingFields)


def parse(kind: type[R], body: Any) -> R:
    """The request in `body`. Raises ApiError 400 that names the field at fault."""
    if not isinstance(body, dict):
        raise bad_request("The body must be a JSON object.")
    try:
        # A field given as null means its default, as OpenAI's clients send it.
        request = kind.model_validate({key: value for key, value in body.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise bad_request(f"{where}: {first['msg']}.", where) from None
    known = set(kind.model_fields) | HARMLESS | set(ONLY)
    for name, value in (request.model_extra or {}).items():
        if name in ONLY:
            if value not in ONLY[name]:
                raise bad_request(f"{name}={value!r} is not supported by engine torch; leave it out.", name)
        elif name not in HARMLESS:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise bad_request(f"Unknown field {name!r}.{hint}", name)
    if isinstance(request, ChatRequest):
        _check_chat(request)
    return request


def _check_chat(request: ChatRequest) -> None:
    if request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs=true.", "top_logprobs")
    if request.tool_choice not in (None, "none", "auto"):
        raise bad_request(
            f"tool_choice={request.tool_choice!r} is not supported: no call can be forced. Use 'auto' or 'none'.",
            "tool_choice",
        )
    if request.tool_choice == "auto" and not request.tools:
        raise bad_request("tool_choice='auto' needs tools.", "tool_choice")
    for index, message in enumerate(request.messages):
        if not isinstance(message.get("role"), str):
            raise bad_request(f"messages.{index}.role: Field required.", f"messages.{index}.role")
    if request.continue_final_message and request.add_generation_prompt:
        raise bad_request("continue_final_message=true needs add_generation_prompt=false.", "continue_final_message")
