"""A user's request as servers take it that read OpenAI's form loosely: what they would stumble over, or pass over in
silence, is refused by name or written in the form that all of them read.

Knows OpenAI's two requests. What one server cannot do beside that is its engine's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from art_core.engines import JSON, Endpoint
from art_core.errors import InvalidRequest

from .chat_messages import plain_messages, plain_tools
from .request_fields import without_harmless

ALLOWED_TOOLS: Final = "send only the tools that may be called"
# Fields of whole numbers, which servers put into tensors of 32 bits: a larger one ends SGLang's scheduler.
WHOLE_NUMBERS: Final = (
    "top_k", "n", "max_tokens", "max_completion_tokens", "min_tokens", "logprobs", "top_logprobs",
    "prompt_logprobs", "truncate_prompt_tokens", "stop_token_ids", "prompt", "logit_bias",
)  # fmt: skip
# Fields that are objects: SGLang answers a text in the place of one with 500.
OBJECTS: Final = ("response_format", "stream_options", "logit_bias", "chat_template_kwargs")
_LARGEST: Final = 2**31 - 1
_LARGEST_SEED: Final = 2**63 - 1


def plain_request(endpoint: Endpoint, body: JSON) -> JSON:
    """The request without what changes nothing and without nulls; messages with contents of text, calls' arguments as
    JSON text, and no role "developer", which takes the place of "system". Raises InvalidRequest.
    """
    plain = {name: value for name, value in without_harmless(body).items() if value is not None}
    for name in OBJECTS:
        if not isinstance(plain.get(name, {}), Mapping):
            raise InvalidRequest(f"{name}: must be an object.", param=name)
    for name in WHOLE_NUMBERS:
        _check_size(plain.get(name), name, _LARGEST)
    _check_size(plain.get("seed"), "seed", _LARGEST_SEED)
    if endpoint == "chat/completions":
        plain["messages"] = [_with_text_arguments(message) for message in plain_messages(plain.get("messages"))]
        tools = plain_tools(plain.pop("tools", None))
        check_tool_choice(plain.get("tool_choice"), tools)
        if tools is not None:
            plain["tools"] = tools
    return plain


def check_tool_choice(choice: Any, tools: Any) -> None:
    """Raises InvalidRequest for a choice that is none, or that the tools don't have."""
    if choice is None or choice == "none":
        return
    if choice in ("auto", "required"):
        if not tools:
            raise InvalidRequest(f"tool_choice={choice!r} needs tools.", param="tool_choice")
        return
    if isinstance(choice, str):
        raise InvalidRequest(
            f"tool_choice={choice!r} is none; there are 'none', 'auto', 'required' and a function by name.",
            param="tool_choice",
        )
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind != "function":
        instead = f"; {ALLOWED_TOOLS}" if kind == "allowed_tools" else ""
        raise InvalidRequest(
            f"tool_choice.type: only a function can be chosen by name{instead}.", param="tool_choice.type"
        )
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    there = [tool["function"]["name"] for tool in plain_tools(tools) or []]
    if not isinstance(name, str) or name not in there:
        raise InvalidRequest(
            f"tool_choice.function.name: must be one of the tools, which are {', '.join(there) or 'none'}.",
            param="tool_choice.function.name",
        )


def _check_size(value: Any, where: str, largest: int) -> None:
    if isinstance(value, list):
        for number, item in enumerate(value):
            _check_size(item, f"{where}.{number}", largest)
    elif isinstance(value, dict):
        for key in value:
            _check_size(key, f"{where}.{key}", largest)
    elif not isinstance(value, str) or where.partition(".")[0] != "prompt":
        try:
            # Servers read numbers out of text too. A whole number may be too large for a float.
            too_large = abs(value if isinstance(value, int) else float(value)) > largest
        except (TypeError, ValueError):
            return  # no number: the server's to refuse
        if too_large:
            raise InvalidRequest(f"{where}: must be a whole number between -{largest} and {largest}.", param=where)


def _with_text_arguments(message: JSON) -> JSON:
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}


def _with_text(call: JSON) -> JSON:
    arguments = call["function"].get("arguments") or {}
    text = json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, Mapping) else arguments
    return {**call, "function": {**call["function"], "arguments": text}}
