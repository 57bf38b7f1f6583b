"""A conversation in OpenAI's form as chat templates take it: every content one text, every tool call whole.

What is malformed is refused by the name of its field. Knows messages and tools, and of a template only which further
roles it knows; no tokenizer and no HTTP.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, NoReturn

from art_core.errors import InvalidRequest

JSON = dict[str, Any]
ROLES: Final = ("system", "developer", "user", "assistant", "tool")
NO_IMAGES: Final = (
    "ART serves and trains on text alone: its trainers could not see what such a model saw. A vision model can be asked"
    " at a vLLM or SGLang server of your own, without ART in between"
)


def plain_messages(messages: Any, *, more_roles: Collection[str] = ()) -> list[JSON]:
    """The messages with every content a text and every tool call's function an object with a name.

    Parts of text are joined by line breaks, and an absent content is an empty text. Role "developer" takes the place of
    "system" unless it is in `more_roles`, the roles that the template knows beside the usual ones; all system messages
    are then one, at the start, where templates look for it. Changes nothing that was given. Raises InvalidRequest.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        _refuse("messages", "must be a list of messages")
    plain = [_message(message, f"messages.{index}", more_roles) for index, message in enumerate(messages)]
    if "developer" in more_roles or all(message["role"] != "developer" for message in plain):
        return plain
    for message in plain:
        if message["role"] == "developer":
            message["role"] = "system"
    return _one_system_message(plain)


def plain_tools(tools: Any) -> list[JSON] | None:
    """The tools as they are, None for an empty list. Raises InvalidRequest for what is no function with a name."""
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        _refuse("tools", "must be a list of tools")
    for index, tool in enumerate(tools):
        where = f"tools.{index}"
        function = _function_of(tool, where)
        if function.get("parameters") is not None and not isinstance(function["parameters"], Mapping):
            _refuse(f"{where}.function.parameters", "must be a JSON schema, which is an object")
    return [dict(tool) for tool in tools] or None


def _message(message: Any, where: str, more_roles: Collection[str]) -> JSON:
    if not isinstance(message, Mapping):
        _refuse(where, "must be an object with a role and a content")
    role = message.get("role")
    if not isinstance(role, str):
        _refuse(f"{where}.role", "must be given, as a text")
    if role not in ROLES and role not in more_roles:
        _refuse(f"{where}.role", f"{role!r} is no role; there are {', '.join(ROLES)}")
    plain = {key: value for key, value in message.items() if value is not None and key != "refusal"}
    if "function_call" in plain:
        _refuse(f"{where}.function_call", "is OpenAI's older form of a tool call; send tool_calls")
    if "audio" in plain:
        _refuse(f"{where}.audio", f"cannot be served. {NO_IMAGES}")
    content = message.get("content")
    # A refusal is what the model said in place of a content.
    plain["content"] = _text(message.get("refusal") if content is None else content, f"{where}.content")
    calls = plain.pop("tool_calls", None)
    if calls is not None:
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            _refuse(f"{where}.tool_calls", "must be a list of tool calls")
        if calls:
            plain["tool_calls"] = [_call(call, f"{where}.tool_calls.{number}") for number, call in enumerate(calls)]
    return plain


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return _whole(content, where)
    if not isinstance(content, Sequence):
        _refuse(where, "must be a text or a list of parts")
    return "\n".join(_part(part, f"{where}.{number}") for number, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        _refuse(where, 'must be an object with a type, such as {"type": "text", "text": "…"}')
    if kind not in ("text", "refusal"):
        _refuse(where, f"a part of type {kind!r} cannot be served. {NO_IMAGES}")
    text = part.get(kind)
    if not isinstance(text, str):
        _refuse(f"{where}.{kind}", "must be a text")
    return _whole(text, f"{where}.{kind}")


def _whole(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = text[error.start].encode("ascii", "backslashreplace").decode()
        _refuse(where, f"holds {lone} at position {error.start}, half of a character, which no tokenizer can read")
    return text


def _call(call: Any, where: str) -> JSON:
    function = _function_of(call, where)
    arguments = function.get("arguments")
    if arguments is not None and not isinstance(arguments, str | Mapping):
        _refuse(f"{where}.function.arguments", "must be the JSON text of an object, or the object")
    if isinstance(arguments, str):
        _whole(arguments, f"{where}.function.arguments")
    return {**call, "function": dict(function)}


def _function_of(value: Any, where: str) -> Mapping[str, Any]:
    """The function that a tool or a tool call is about."""
    if not isinstance(value, Mapping):
        _refuse(where, "must be an object with a function")
    if value.get("type", "function") != "function":
        _refuse(f"{where}.type", f"{value['type']!r} is not supported; only functions are")
    function = value.get("function")
    if not isinstance(function, Mapping):
        _refuse(f"{where}.function", "must be an object with a name")
    if not isinstance(function.get("name"), str) or not function["name"]:
        _refuse(f"{where}.function.name", "must be given, as a text")
    return function


def _one_system_message(messages: list[JSON]) -> list[JSON]:
    said = [message["content"] for message in messages if message["role"] == "system" and message["content"]]
    others = [message for message in messages if message["role"] != "system"]
    if messages[0]["role"] == "system" and len(others) == len(messages) - 1:
        return messages
    return [{"role": "system", "content": "\n\n".join(said)}, *others]


def _refuse(param: str, problem: str) -> NoReturn:
    raise InvalidRequest(f"{param}: {problem}.", param=param)
