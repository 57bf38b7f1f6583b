"""Finds Hermes-style tool calls, `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, in generated text.

Knows text only. Whatever does not parse as a call stays text: nothing that the model said is dropped.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any, Final

START: Final = "<tool_call>"
END: Final = "</tool_call>"


@dataclass(frozen=True)
class Parsed:
    """Text beside the calls, and the calls in OpenAI's form."""

    text: str
    calls: list[dict[str, Any]] = field(default_factory=list)


class ToolCallStream:
    """Separates text and calls while they are being generated. `found` counts the calls so far."""

    def __init__(self) -> None:
        self._pending = ""
        self.found = 0

    def push(self, piece: str) -> Parsed:
        """Text and calls that this piece makes certain; a call comes out whole, once its end is there."""
        self._pending += piece
        text, calls = "", []
        while True:
            start = self._pending.find(START)
            if start < 0:
                keep = _overlap(self._pending, START)
                cut = len(self._pending) - keep
                text += self._pending[:cut]
                self._pending = self._pending[cut:]
                break
            text += self._pending[:start]
            self._pending = self._pending[start:]
            end = self._pending.find(END)
            if end < 0:
                break
            whole = self._pending[: end + len(END)]
            self._pending = self._pending[end + len(END) :]
            call = self._call(whole[len(START) : -len(END)])
            if call is None:
                text += whole
            else:
                calls.append(call)
                self._pending = self._pending.removeprefix("\n")
        return self._tidy(text, calls)

    def flush(self) -> Parsed:
        """What is left at the end; a call whose end tag was never generated counts if its JSON is whole."""
        rest, self._pending = self._pending, ""
        if rest.startswith(START) and (call := self._call(rest[len(START) :])) is not None:
            return Parsed("", [call])
        return self._tidy(rest, [])

    def _tidy(self, text: str, calls: list[dict[str, Any]]) -> Parsed:
        # White space around calls belongs to their layout, not to what the model said.
        return Parsed("" if self.found and not text.strip() else text, calls)

    def _call(self, body: str) -> dict[str, Any] | None:
        try:
            data = json.loads(body)
        except ValueError:
            return None
        if not isinstance(data, dict) or not isinstance(data.get("name"), str):
            return None
        arguments = data.get("arguments", data.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        index, self.found = self.found, self.found + 1
        function = {"name": data["name"], "arguments": arguments}
        return {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def parse_tool_calls(text: str) -> Parsed:
    """All of a finished answer. Its calls have no `index`, as OpenAI's whole answers have none."""
    stream = ToolCallStream()
    parts = (stream.push(text), stream.flush())
    calls = [{k: v for k, v in call.items() if k != "index"} for part in parts for call in part.calls]
    content = "".join(part.text for part in parts)
    return Parsed(content.rstrip() if calls else content, calls)


def _overlap(text: str, tag: str) -> int:
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)
