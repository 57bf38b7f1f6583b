"""Which tokens of a written conversation are the assistant's, as its chat template itself shows.

Where the template has `{% generation %}`, that says it. Elsewhere the conversation is written up to each reply and with
it, and each of these texts must be the beginning of the next. Knows no marker of any model, and nothing of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from art_core.errors import InvalidTrajectory
from art_engine_kit.chat_rendering import ChatRenderer

from .rows import Ints


@dataclass(frozen=True, slots=True)
class ReplyRow:
    """Tokens, of shape [length], and the positions of those that the assistant wrote, ascending, each at least 1."""

    token_ids: Ints
    trained: Ints


@dataclass(frozen=True)
class ReplyRows:
    """A conversation as rows in which each of its replies is trained exactly once.

    `problems` names the replies that got a row of their own, or begin otherwise than the template asks for them, and
    what the template does there.
    """

    rows: list[ReplyRow]
    problems: list[str]


def reply_rows(renderer: ChatRenderer, tokenizer: Any, messages: Sequence[Any], tools: Any, *, where: str) -> ReplyRows:
    """The rows of a conversation; none when no reply is in it.

    A reply ends with the last end-of-turn token that the template writes after it, where there is one. A token that
    reaches over a reply's edge is not trained. `where` is the conversation's name. Raises InvalidTrajectory, naming the
    reply, where the template writes what came before a reply differently once the reply is there; InvalidRequest for
    messages that the template does not take.
    """
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not replies:
        return ReplyRows([], [])
    if renderer.marks_replies:
        ids, mask = renderer.marked(messages, tools=tools)
        row = _row(ids, np.flatnonzero(mask))
        return ReplyRows([row] if len(row.trained) else [], [])
    problems: list[str] = []
    whole = renderer.text(messages[: replies[-1] + 1], tools=tools, generate=False)
    together: list[tuple[int, int]] = []
    rows: list[ReplyRow] = []
    for index in replies:
        name = f"{where}.messages_and_choices[{index}]"
        text = renderer.text(messages[: index + 1], tools=tools, generate=False)
        start, problem = _begin(renderer, messages[:index], tools, text, name)
        problems += [problem] if problem else []
        if whole.startswith(text) and all(end <= start for _, end in together):
            together.append((start, len(text)))
        else:
            problems.append(
                f"{name} is trained in a row of its own: the chat template writes it differently once more messages"
                f" follow, {_difference(text, whole)}."
            )
            rows += _written(tokenizer, text, [(start, len(text))])
    return ReplyRows(_written(tokenizer, whole, together) + rows, problems)


def _begin(renderer: ChatRenderer, before: Sequence[Any], tools: Any, text: str, name: str) -> tuple[int, str]:
    """Where in `text` the reply begins, and what is unusual about it."""
    if not before:
        raise InvalidTrajectory(f"{name} is a reply to nothing. Put the message before it that it replies to.")
    prompt = renderer.text(before, tools=tools, generate=True)
    if text.startswith(prompt):
        return len(prompt), ""
    closed = renderer.text(before, tools=tools, generate=False)
    if not text.startswith(closed):
        raise InvalidTrajectory(
            f"{name}: the chat template writes what came before this reply differently once the reply is there,"
            f" {_difference(closed, text)}, so the reply's own tokens cannot be told. Give a chat_template in"
            " _internal_config that has {% generation %} around replies, or leave this turn out."
        )
    return _common(prompt, text), (
        f"{name}: the chat template asks for a reply otherwise than it writes this one, {_difference(prompt, text)};"
        " trained is what comes after what both have."
    )


def _difference(one: str, other: str) -> str:
    """Where two texts part, in a few characters of each."""
    at = _common(one, other)
    return f"{one[at : at + 30]!r} against {other[at : at + 30]!r} after {one[max(0, at - 30) : at]!r}"


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _written(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> list[ReplyRow]:
    if not spans:
        return []
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = np.array(made["input_ids"], dtype=np.int32), np.array(made["offset_mapping"]).reshape(-1, 2)
    trained = []
    for start, end in spans:
        inside = np.flatnonzero((offsets[:, 0] >= start) & (offsets[:, 1] <= end))
        ends_of_turn = np.flatnonzero(ids[inside] == tokenizer.eos_token_id)
        trained.append(inside[: ends_of_turn[-1] + 1] if len(ends_of_turn) else inside)
    row = _row(ids, np.concatenate(trained))
    return [row] if len(row.trained) else []


def _row(ids: Any, trained: Any) -> ReplyRow:
    positions = np.asarray(trained, dtype=np.int32)
    return ReplyRow(np.asarray(ids, dtype=np.int32), positions[positions > 0])
