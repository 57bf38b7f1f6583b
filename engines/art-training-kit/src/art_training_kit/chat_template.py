"""Token ids for assistant messages that came without them, through the base model's chat template.

Used only when a job allows training without logprobs. Everything sampled through the gateway carries its own ids and
never comes here. Knows messages and a tokenizer; knows no rewards and no packing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from art_core.errors import InvalidTrajectory
from art_core.trajectories import History


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer with the template and the keyword arguments that the model was configured with."""

    tokenizer: Any
    template: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def sampled(self, history: History, index: int, *, where: str) -> tuple[list[int], list[int]]:
        """The prompt's ids and the ids of the assistant message at `index`, up to and with its end-of-turn token.

        Raises InvalidTrajectory when the template does not put the message after the prompt, as one that drops
        earlier reasoning may.
        """
        read = History(messages_and_choices=history.messages_and_choices[: index + 1])
        messages = [self._readable(message) for message in read.messages()]
        prompt = self._ids(messages[:-1], history.tools, generate=True)
        whole = self._ids(messages, history.tools, generate=False)
        if whole[: len(prompt)] != prompt:
            raise InvalidTrajectory(
                f"{where} came without token ids, and the chat template does not write its message right after its"
                " prompt, so the"
                " sampled tokens cannot be found again. Take choices from the gateway, which carry their token ids."
            )
        answer = whole[len(prompt) :]
        end = self.tokenizer.eos_token_id
        if end in answer:
            answer = answer[: len(answer) - answer[::-1].index(end)]
        return prompt, answer

    def _ids(self, messages: list[Any], tools: Any, *, generate: bool) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=generate,
            **({"chat_template": self.template} if self.template is not None else {}),
            **self.arguments,
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _readable(self, message: Any) -> Any:
        calls = message.get("tool_calls")
        source = self.template or getattr(self.tokenizer, "chat_template", None) or ""
        if not calls or "arguments" not in str(source) or "items" not in str(source):
            return message
        # Such a template iterates over the arguments; the API carries them as JSON text.
        return {**message, "tool_calls": [{**c, "function": _with_object(c["function"])} for c in calls]}


def _with_object(function: Any) -> Any:
    arguments = function.get("arguments")
    return {**function, "arguments": json.loads(arguments)} if isinstance(arguments, str) else function
