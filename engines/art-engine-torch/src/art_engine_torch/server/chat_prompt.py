"""Turns messages or text into token ids, and token ids into the strings that logprobs show.

Knows the tokenizer and its chat template. What the ids are used for it does not know.
"""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import AutoTokenizer, GenerationConfig

from .api_errors import bad_request
from .api_requests import ChatRequest
from .prefix_cache import Tokens


class PromptBuilder:
    """The tokenizer of a model folder. `end_ids` are the token ids that end an answer."""

    def __init__(self, folder: Path, *, chat_template: Path | None, vocab: int) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
        self._vocab = vocab
        ends = {self.tokenizer.eos_token_id}
        if (folder / "generation_config.json").is_file():
            configured = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
            ends |= set(configured) if isinstance(configured, list) else {configured}
        self.end_ids = frozenset(end for end in ends if isinstance(end, int))

    def from_messages(self, request: ChatRequest) -> Tokens:
        """The prompt of a chat request. Raises ApiError 400 when the template cannot take it."""
        template = request.chat_template or self.tokenizer.chat_template
        if not template:
            raise bad_request(
                "This model has no chat template; use /v1/completions, or start the server with --chat-template.",
                "messages",
            )
        messages = [_for_template(index, message) for index, message in enumerate(request.messages)]
        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=request.tools or None,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=request.add_generation_prompt,
                    continue_final_message=request.continue_final_message,
                    **(request.chat_template_kwargs or {}),
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise bad_request(f"The chat template does not take these messages: {error}", "messages") from error
        return self._encode(text, add_special_tokens=request.add_special_tokens)

    def from_prompt(self, prompt: str | list[int], *, add_special_tokens: bool) -> Tokens:
        """The prompt of a completion request: text, or token ids as they are."""
        if isinstance(prompt, str):
            tokens = self._encode(prompt, add_special_tokens=add_special_tokens)
        else:
            outside = [token for token in prompt if not 0 <= token < self._vocab]
            if outside:
                raise bad_request(f"Token id {outside[0]} is outside the vocabulary of {self._vocab}.", "prompt")
            tokens = np.array(prompt, dtype=np.int32)
        if not len(tokens):
            raise bad_request("The prompt has no tokens.", "prompt")
        return tokens

    @functools.lru_cache(maxsize=65536)  # noqa: B019 - one builder lives as long as the process
    def token_text(self, token: int) -> str:
        """How a single token reads, special ones included."""
        return str(self.tokenizer.decode([token], skip_special_tokens=False))

    def _encode(self, text: str, *, add_special_tokens: bool) -> Tokens:
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens, return_attention_mask=False)["input_ids"]
        return np.array(ids, dtype=np.int32)


def _for_template(index: int, message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates expect it: content is text, and arguments of calls are objects."""
    message = dict(message)
    content = message.get("content")
    if content is None:
        message["content"] = ""
    elif isinstance(content, list):
        parts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") not in ("text", "refusal"):
                kind = part.get("type") if isinstance(part, dict) else part
                raise bad_request(
                    f"Content of type {kind!r} is not supported; only text is.", f"messages.{index}.content"
                )
            parts.append(str(part.get("text", part.get("refusal", ""))))
        message["content"] = "\n".join(parts)
    elif not isinstance(content, str):
        raise bad_request("content must be a string or a list of parts.", f"messages.{index}.content")
    if message.get("tool_calls"):
        message["tool_calls"] = [_call_for_template(call) for call in message["tool_calls"]]
    return message


def _call_for_template(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    if isinstance(function.get("arguments"), str):
        # Malformed arguments that the model itself wrote go back to it as it wrote them.
        with contextlib.suppress(ValueError):
            function["arguments"] = json.loads(function["arguments"])
    return {**call, "function": function}
