"""Puts what an agent asked and was answered, call by call, back into the conversations that it led.

A call continues the conversation whose messages its own begin with; any other, such as a sub-agent's or one whose past
was rewritten, begins a conversation of its own, with what came before it as given. Knows messages and choices; knows no
wire, no environment and no token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from art_core import History
from art_core.trajectories import message_of

if TYPE_CHECKING:
    from openai.types.chat.chat_completion import Choice


@dataclass(frozen=True)
class Exchange:
    """One answered chat completion: the messages and tools that were sent, as JSON, and the choice that came back."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    choice: Choice


@dataclass
class _Conversation:
    tools: list[dict[str, Any]] | None
    items: list[Any] = field(default_factory=list)
    compared: list[Any] = field(default_factory=list)

    def add(self, messages: list[dict[str, Any]], compared: list[Any], choice: Choice) -> None:
        self.items += [*messages[len(self.items) :], choice]
        self.compared = [*compared, _compared(message_of(choice))]


def histories_of(exchanges: Iterable[Exchange]) -> list[History]:
    """The conversations of these exchanges, in the order in which they began; each choice is in exactly one.

    Of several that a call could continue it continues the longest. What the sender may write differently without
    meaning anything else, an absent content or the spaces of a tool call's arguments, doesn't part conversations.
    """
    conversations: list[_Conversation] = []
    for exchange in exchanges:
        compared = [_compared(message) for message in exchange.messages]
        continued = [
            conversation
            for conversation in conversations
            if conversation.tools == exchange.tools and conversation.compared == compared[: len(conversation.compared)]
        ]
        conversation = max(continued, key=lambda one: len(one.compared), default=None)
        if conversation is None:
            conversations.append(conversation := _Conversation(exchange.tools))
        conversation.add(exchange.messages, compared, exchange.choice)
    return [History(messages_and_choices=one.items, tools=one.tools) for one in conversations]


def _compared(message: Mapping[str, Any]) -> Any:
    calls = [
        (call.get("id"), function.get("name"), _arguments(function.get("arguments")))
        for call in message.get("tool_calls") or ()
        for function in [call.get("function") or call.get("custom") or {}]
    ]
    return message.get("role"), _text(message.get("content")), message.get("tool_call_id"), calls


def _arguments(written: Any) -> Any:
    try:
        return json.loads(written)
    except (TypeError, ValueError):
        return written


def _text(content: Any) -> Any:
    """A content in parts that are all text is the same as their text."""
    if not isinstance(content, list):
        return content or ""
    texts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    return "".join(texts) if len(texts) == len(content) else content
