"""Turns a conversation into the text that a model is asked with: one way for the server that asks and for the trainer.

The template itself is rendered by the tokenizer's own `apply_chat_template`. Knows nothing of requests beyond messages,
tools and a template's arguments, and of token ids only that the tokenizer marks those of a template's own replies.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any, Final, Protocol

from art_core.errors import InvalidRequest

from .chat_messages import JSON, plain_messages, plain_tools

# A conversation with one tool call, which shows how a template writes arguments. Mistral's want ids of nine letters.
_ASKED: Final = {"role": "user", "content": "?"}
_ANSWERED: Final = {"role": "tool", "tool_call_id": "artprobe1", "name": "art_probe", "content": "!"}
_PROBE_KEY: Final = "art_probed"
_REPLY_TAG: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")


class RendersChats(Protocol):
    """The one thing needed of a tokenizer. `chat_template` is its own template, or several by name."""

    chat_template: Any

    def apply_chat_template(self, conversation: list[JSON], /, **options: Any) -> Any:
        """The text of a conversation, when called with tokenize=False; else what the tokenizer makes of it."""


class ChatRenderer:
    """A tokenizer with a chat template, its own unless `template` is given, and the template's `arguments`."""

    def __init__(
        self, tokenizer: RendersChats, template: str | None = None, arguments: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._arguments = dict(arguments or {})
        own = template if template is not None else tokenizer.chat_template
        self._source = "\n".join(map(str, own.values())) if isinstance(own, Mapping) else str(own or "")
        self._reserved = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters} - {"kwargs"}

    def text(
        self,
        messages: Any,
        *,
        tools: Any = None,
        arguments: Mapping[str, Any] | None = None,
        generate: bool,
        continue_final: bool = False,
    ) -> str:
        """What the model reads. `generate` ends it where an answer begins, `continue_final` inside the last message.

        `arguments` win over those of the renderer. Raises InvalidRequest, naming the field, for messages that are
        malformed or that the template does not take; with the template's own sentence where it has one.
        """
        self._refuse_without_template()
        for name in arguments or {}:
            if name in self._reserved:
                where = f"chat_template_kwargs.{name}"
                raise InvalidRequest(f"{where}: is not the template's to decide; leave it out.", param=where)
        plain, schemas = self._plain(messages, tools)
        options = {**self._arguments, **(arguments or {})}
        try:
            text = self._render(plain, schemas, options, generate=generate, continue_final=continue_final)
            text.encode()
        except Exception as error:  # templates are programs: what they raise is anything
            raise _does_not_take(error) from error
        if not text:
            raise InvalidRequest(
                "messages: the chat template writes nothing for them, and after nothing nothing can be said.",
                param="messages",
            )
        return text

    @property
    def marks_replies(self) -> bool:
        """Whether the template itself says what the assistant wrote, by `{% generation %}`."""
        return _REPLY_TAG.search(self._source) is not None

    def marked(self, messages: Any, *, tools: Any = None) -> tuple[list[int], list[int]]:
        """The ids of a conversation, and for each 1 if it lies within the template's `{% generation %}`, else 0.

        Raises as `text` does.
        """
        self._refuse_without_template()
        plain, schemas = self._plain(messages, tools)
        chosen: JSON = {} if self._template is None else {"chat_template": self._template}
        try:
            made = self._tokenizer.apply_chat_template(
                plain, tools=schemas, return_dict=True, return_assistant_tokens_mask=True, **chosen, **self._arguments
            )
        except Exception as error:  # as in `text`
            raise _does_not_take(error) from error
        return list(made["input_ids"]), list(made["assistant_masks"])

    def _refuse_without_template(self) -> None:
        if not self._source:
            raise InvalidRequest("messages: this model has no chat template to write them with.", param="messages")

    def _plain(self, messages: Any, tools: Any) -> tuple[list[JSON], Any]:
        plain, schemas = plain_messages(messages, more_roles=_words(self._source)), plain_tools(tools)
        if any("tool_calls" in message for message in plain):
            plain = [_with_arguments(message, as_text=self._arguments_are_text) for message in plain]
        return plain, schemas

    def _render(
        self, messages: list[JSON], tools: Any, options: Mapping[str, Any], *, generate: bool, continue_final: bool
    ) -> str:
        chosen: JSON = {} if self._template is None else {"chat_template": self._template}
        if continue_final:
            chosen["continue_final_message"] = True
        return str(
            self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generate, **chosen, **options
            )
        )

    @functools.cached_property
    def _arguments_are_text(self) -> bool:
        """Whether this template takes a call's arguments as JSON text: it cannot write an object, or writes Python's
        form of it, and writes the text as it is. All others take the object.
        """
        value = {_PROBE_KEY: "value"}
        as_object, as_text = self._probe(value), self._probe(json.dumps(value))
        if as_object is not None and f"'{_PROBE_KEY}'" not in as_object:
            return False
        return as_text is not None and json.dumps(value) in as_text

    def _probe(self, arguments: Any) -> str | None:
        call = {"id": "artprobe1", "type": "function", "function": {"name": "art_probe", "arguments": arguments}}
        said = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            return self._render([_ASKED, said, _ANSWERED], None, self._arguments, generate=False, continue_final=False)
        except Exception:  # as above; it says no
            return None


@functools.lru_cache(maxsize=64)
def _words(template: str) -> frozenset[str]:
    """The words that stand in a template as strings, among them the roles that it knows."""
    return frozenset(re.findall(r"""["']([A-Za-z_]+)["']""", template))


def _with_arguments(message: JSON, *, as_text: bool) -> JSON:
    calls = message.get("tool_calls")
    if calls is None:
        return message
    form = _as_text if as_text else _as_object
    return {
        **message,
        "tool_calls": [
            {**call, "function": {**call["function"], "arguments": form(call["function"].get("arguments"))}}
            for call in calls
        ],
    }


def _as_text(arguments: Any) -> str:
    if isinstance(arguments, str):
        return arguments.strip() or "{}"
    return json.dumps(arguments or {}, ensure_ascii=False)


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments or {}
    if not arguments.strip():
        return {}
    try:
        value = json.loads(arguments)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return arguments  # what the model wrote, though it is no JSON, goes back to it as it wrote it
    return value


def _does_not_take(error: Exception) -> InvalidRequest:
    said = str(error).encode("utf-8", "backslashreplace").decode()
    # A template's own sentence stands alone; any other error is told with its kind.
    kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
    return InvalidRequest(f"messages: the chat template does not take them: {kind}{said}", param="messages")
