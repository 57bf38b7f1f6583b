"""What a request asks the shape of its answer to be: a response format, a tool choice.

Reads JSON and names functions and schemas; knows no grammar.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from art_engine_kit.chat_messages import plain_tools


class JsonSchema(BaseModel):
    """`strict` refuses a schema with keywords that cannot be enforced; else they are passed over."""

    name: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(BaseModel):
    """Anything."""

    type: Literal["text"]


class JsonObjectFormat(BaseModel):
    """An object of JSON."""

    type: Literal["json_object"]


class JsonSchemaFormat(BaseModel):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


@dataclass(frozen=True)
class ForcedCalls:
    """Calls that an answer must consist of: of one of `functions`, (name, schema of the arguments, strict), and only
    one of them unless `several`.
    """

    functions: list[tuple[str, dict[str, Any], bool]]
    several: bool


def forced_calls(choice: Any, tools: Any, *, parallel: bool) -> ForcedCalls | None:
    """The calls that a checked choice forces; None when it forces none. A function chosen by name is called once."""
    if choice in (None, "none", "auto"):
        return None
    name = None if choice == "required" else choice["function"]["name"]
    functions = [tool["function"] for tool in plain_tools(tools) or []]
    return ForcedCalls(
        [
            (function["name"], dict(function.get("parameters") or {}), bool(function.get("strict")))
            for function in functions
            if name in (None, function["name"])
        ],
        several=parallel and name is None,
    )
