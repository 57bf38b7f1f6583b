"""What clients may send to the two generation endpoints, checked field by field.

A field that would change the answer and isn't implemented is refused by name, never ignored. Knows shapes of JSON and
limits of values; templates, token ids and the engine are elsewhere.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from art_core.errors import InvalidRequest
from art_engine_kit.plain_request import check_tool_choice
from art_engine_kit.request_fields import unknown_field, without_harmless

from .api_errors import bad_request
from .api_structure import ResponseFormat

# Of vLLM's fields, those that are bookkeeping only.
HARMLESS: Final = frozenset({"request_id", "cache_salt", "priority"})
# Fields that do nothing at these values and would change the answer at others.
ONLY: Final[dict[str, tuple[Any, ...]]] = {
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": (),
    "documents": ([],),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
}
# Choices of one request, over all of its prompts.
MOST_CHOICES: Final = 4096
# Below it a temperature is no more than rounding.
COLDEST: Final = 1e-4


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not a boolean")
    return value


Whole = Annotated[int, BeforeValidator(_no_boolean)]
Number = Annotated[float, BeforeValidator(_no_boolean)]
StopString = Annotated[str, Field(max_length=1024)]


class StreamOptions(BaseModel):
    """`include_usage` asks for one last chunk with the token counts."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False


class SamplingFields(BaseModel):
    """What both endpoints share. Limits of values are OpenAI's and vLLM's."""

    model_config = ConfigDict(extra="allow")

    model: str
    n: Whole = Field(default=1, ge=1, le=1024)
    seed: Whole | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=32)] | None = None
    stop_token_ids: list[Whole] | None = Field(default=None, max_length=4096)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    temperature: Number = Field(default=1.0, ge=0.0, le=100.0, allow_inf_nan=False)
    top_p: Number = Field(default=1.0, gt=0.0, le=1.0)
    top_k: Whole = Field(default=0, ge=-1)
    min_p: Number = Field(default=0.0, ge=0.0, le=1.0)
    presence_penalty: Number = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: Number = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: Number = Field(default=1.0, gt=0.0, le=10.0)
    logit_bias: dict[str, Annotated[Number, Field(ge=-100.0, le=100.0)]] | None = Field(default=None, max_length=4096)
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        return [stop for stop in stops if stop]

    def biases(self, vocabulary: int) -> dict[int, float]:
        """`logit_bias` by token id. Raises ApiError 400 for what is no id of this vocabulary."""
        found = {}
        for key, bias in (self.logit_bias or {}).items():
            token = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else vocabulary
            if token >= vocabulary:
                where = f"logit_bias.{key}"
                raise bad_request(f"{where}: is no token id of this model, which has {vocabulary}.", where)
            found[token] = bias
        return found


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions. Messages and tools are checked where prompts are written."""

    messages: list[Any] = Field(min_length=1)
    max_tokens: Whole | None = Field(default=None, ge=1)
    max_completion_tokens: Whole | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: Whole | None = Field(default=None, ge=0, le=20)
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = None
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

    prompt: str | list[Whole] | list[str] | list[list[Whole]]
    max_tokens: Whole = Field(default=16, ge=1)
    logprobs: Whole | None = Field(default=None, ge=0, le=20)
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


def parse(kind: type[R], body: dict[str, Any]) -> R:
    """The request in `body`. Raises ApiError 400 that names the field at fault."""
    try:
        # A field given as null means its default, as OpenAI's clients send it.
        request = kind.model_validate(
            {key: value for key, value in without_harmless(body).items() if value is not None}
        )
        _check_unknown(kind, request)
        if isinstance(request, ChatRequest):
            _check_chat(request)
    except InvalidRequest as error:
        raise bad_request(str(error), error.param) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = _place(first["loc"], body)
        raise bad_request(f"{where}: {first['msg']}.", where) from None
    return request


def _place(location: tuple[int | str, ...], body: dict[str, Any]) -> str:
    """Where in a body an error is. pydantic names the members of unions that it tried too, which are no keys."""
    if location[0] == "response_format":
        location = (location[0], *location[2:])
    at: Any = body
    parts: list[str] = []
    for part in location:
        inside = isinstance(at, dict) and (part in at or part == location[-1])
        if inside or (isinstance(at, list) and isinstance(part, int)):
            parts.append(str(part))
            at = at.get(part) if isinstance(at, dict) else at[int(part)] if int(part) < len(at) else None
    return ".".join(parts)


def _check_unknown(kind: type[SamplingFields], request: SamplingFields) -> None:
    for name, value in (request.model_extra or {}).items():
        if name in ONLY:
            if value not in ONLY[name]:
                raise InvalidRequest(f"{name} is not supported by engine torch; leave it out.", param=name)
        elif name not in HARMLESS:
            raise unknown_field(name, set(kind.model_fields) | HARMLESS | set(ONLY))


def _check_chat(request: ChatRequest) -> None:
    if request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs=true.", "top_logprobs")
    if request.continue_final_message and request.add_generation_prompt:
        raise bad_request("continue_final_message=true needs add_generation_prompt=false.", "continue_final_message")
    check_tool_choice(request.tool_choice, request.tools)
