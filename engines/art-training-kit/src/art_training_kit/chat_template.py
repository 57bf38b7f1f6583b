"""Token ids for assistant messages that came without them, through the base model's chat template.

Used only when a job allows training without logprobs. Everything sampled through the gateway carries its own ids and
never comes here. Knows messages and a tokenizer; how a conversation is written is `chat_rendering`'s, as for a server.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from art_core.errors import InvalidRequest, InvalidTrajectory
from art_core.trajectories import History
from art_engine_kit.chat_rendering import ChatRenderer


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer with the template and the keyword arguments that the model was configured with."""

    tokenizer: Any
    template: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def _renderer(self) -> ChatRenderer:
        return ChatRenderer(self.tokenizer, self.template, self.arguments)

    def sampled(self, history: History, index: int, *, where: str) -> tuple[list[int], list[int]]:
        """The prompt's ids and the ids of the assistant message at `index`, up to and with its end-of-turn token.

        `where` is the history's name. Raises InvalidTrajectory when the template does not put the message after the
        prompt, as one that drops earlier reasoning may, and for messages that could not have been served.
        """
        read = History(messages_and_choices=history.messages_and_choices[: index + 1])
        messages = read.messages()
        try:
            prompt = self._ids(self._renderer.text(messages[:-1], tools=history.tools, generate=True))
            whole = self._ids(self._renderer.text(messages, tools=history.tools, generate=False))
        except InvalidRequest as error:
            raise InvalidTrajectory(f"{where}{_in_trajectory(error, index)}") from error
        if whole[: len(prompt)] != prompt:
            raise InvalidTrajectory(
                f"{where}.messages_and_choices[{index}] came without token ids, and the chat template does not write"
                " its message right after its prompt, so the sampled tokens cannot be found again. Take choices from"
                " the gateway, which carry their token ids."
            )
        answer = whole[len(prompt) :]
        end = self.tokenizer.eos_token_id
        if end in answer:
            answer = answer[: len(answer) - answer[::-1].index(end)]
        return prompt, answer

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _in_trajectory(error: InvalidRequest, index: int) -> str:
    """What is wrong, after the place as a trajectory has it: messages.2.content is messages_and_choices[2].content.

    What is wrong with all messages together is told of the one at `index`, for which they were asked.
    """
    said = str(error).removeprefix(f"{error.param}: ")
    first, _, rest = error.param.partition(".")
    if first != "messages":
        return f".{error.param}: {said}"
    if not rest:
        without = (
            f".messages_and_choices[{index}] came without token ids, and the conversation up to it cannot be written"
        )
        return f"{without}: {said}"
    number, _, inside = rest.partition(".")
    return f".messages_and_choices[{number}]{'.' + inside if inside else ''}: {said}"
