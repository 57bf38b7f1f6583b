"""The schema of answers: sound ones pass, and each with one thing changed is noticed.

Knows no server; what a real one answers is held by the check of INF-133.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from art_conformance.answer_schema import (
    assert_chat_completion,
    assert_chunks,
    assert_completion,
    assert_error,
    assert_models,
)

USAGE = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
ENTRY = {"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": []}
TEXT_LOGPROBS = {"token_logprobs": [-1.0] * 3, "tokens": ["a"] * 3, "text_offset": [0, 1, 2], "top_logprobs": None}
IDS = {"token_ids": [7, 8, 9], "prompt_token_ids": [1, 2]}
CHAT: Any = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "aaa"},
            "logprobs": {"content": [ENTRY] * 3},
            **IDS,
        }
    ],
    "usage": USAGE,
}
TEXT: Any = {
    "id": "1",
    "object": "text_completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "length", "text": "aaa", "logprobs": TEXT_LOGPROBS, **IDS}],
    "usage": USAGE,
}
CHUNK = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
DELTA = {"index": 0, "delta": {"content": "a"}, "finish_reason": None, "logprobs": {"content": [ENTRY]}}
CHUNKS: Any = [
    {**CHUNK, "choices": [{**DELTA, "token_ids": [7], "prompt_token_ids": [1, 2]}]},
    {**CHUNK, "choices": [{**DELTA, "token_ids": [8]}]},
    {**CHUNK, "choices": [{**DELTA, "token_ids": [9], "finish_reason": "stop"}]},
    {**CHUNK, "choices": [], "usage": USAGE},
]
MODELS: Any = {"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "someone"}]}
ERROR: Any = {"error": {"message": "There is no such model.", "type": "not_found", "param": None, "code": 404}}
FLAT_ERROR: Any = {"object": "error", **ERROR["error"]}
# Where something is changed → what holds it and what is sound.
SOUND: dict[str, tuple[Callable[[Any], None], Any]] = {
    "chat": (assert_chat_completion, CHAT),
    "text": (assert_completion, TEXT),
    "chunks": (assert_chunks, CHUNKS),
    "models": (assert_models, MODELS),
    "error": (assert_error, ERROR),
    "flat error": (assert_error, FLAT_ERROR),
}
# A path in it, and what stands there instead; None is a field that is missing.
CHANGES: list[tuple[str, tuple[Any, ...], Any]] = [
    ("chat", ("id",), 5),
    ("chat", ("created",), "1"),
    ("chat", ("object",), "chat"),
    ("chat", ("model",), None),
    ("chat", ("usage",), None),
    ("chat", ("usage", "prompt_tokens"), 3),
    ("chat", ("usage", "completion_tokens"), "3"),
    ("chat", ("usage", "total_tokens"), 6),
    ("chat", ("choices", 0, "index"), "0"),
    ("chat", ("choices", 0, "finish_reason"), "because"),
    ("chat", ("choices", 0, "finish_reason"), None),
    ("chat", ("choices", 0, "message", "role"), "user"),
    ("chat", ("choices", 0, "message", "content"), ["aaa"]),
    ("chat", ("choices", 0, "message", "tool_calls"), [{"id": "1", "type": "function", "function": {"name": "f"}}]),
    ("chat", ("choices", 0, "logprobs", "content"), [ENTRY] * 2),
    ("chat", ("choices", 0, "logprobs", "content"), [{**ENTRY, "logprob": "-1.0"}] * 3),
    ("chat", ("choices", 0, "token_ids"), [7, 8, 9.5]),
    ("chat", ("choices", 0, "token_ids"), ["7", "8", "9"]),
    ("chat", ("choices", 0, "prompt_token_ids"), []),
    ("text", ("object",), "chat.completion"),
    ("text", ("usage", "completion_tokens"), 2),
    ("text", ("choices", 0, "text"), None),
    ("text", ("choices", 0, "finish_reason"), "tool_calls"),
    ("text", ("choices", 0, "logprobs", "token_logprobs"), [-1.0, -1.0]),
    ("text", ("choices", 0, "logprobs", "tokens"), ["a", "a"]),
    ("text", ("choices", 0, "logprobs", "tokens"), [1, 2, 3]),
    ("chunks", (0, "object"), "chat.completion"),
    ("chunks", (1, "choices", 0, "delta"), None),
    ("chunks", (1, "choices", 0, "token_ids"), ["8"]),
    ("chunks", (1, "choices", 0, "token_ids"), []),
    ("chunks", (2, "choices", 0, "finish_reason"), None),
    ("chunks", (0, "choices", 0, "prompt_token_ids"), [1]),
    ("chunks", (3, "usage"), None),
    ("chunks", (3, "usage", "total_tokens"), 4),
    ("models", ("object",), None),
    ("models", ("data",), []),
    ("models", ("data", 0, "created"), "1"),
    ("models", ("data", 0, "owned_by"), None),
    ("error", ("error",), "There is no such model."),
    ("error", ("error", "message"), ""),
    ("error", ("error", "message"), ["There is no such model."]),
    ("error", ("error", "type"), 404),
    ("flat error", ("message",), None),
    ("flat error", ("code",), [404]),
]


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_answer_passes(kind: str) -> None:
    held, sound = SOUND[kind]
    held(sound)


@pytest.mark.parametrize(("kind", "path", "instead"), CHANGES)
def test_one_change_is_noticed(kind: str, path: tuple[Any, ...], instead: Any) -> None:
    held, sound = SOUND[kind]
    changed = copy.deepcopy(sound)
    *way, last = path
    place = changed
    for step in way:
        place = place[step]
    if instead is None:
        del place[last]
    else:
        place[last] = instead
    with pytest.raises((AssertionError, ValueError)):
        held(changed)
