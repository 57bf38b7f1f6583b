"""Finds Hermes-style tool calls, `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, in generated text.

A call ends where its JSON ends: tags inside its strings are text of the strings. Whatever isn't a call stays text, so
that nothing the model said is dropped. Knows text only, and imports nothing of ours: servers in environments of their
own run this file too.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

START = "<tool_call>"
END = "</tool_call>"


@dataclass(frozen=True)
class Parsed:
    """Text beside the calls, and the calls in OpenAI's form."""

    text: str
    calls: list[dict[str, Any]] = field(default_factory=list)


class ToolCallStream:
    """Separates text and calls while they are being generated. `found` counts the calls so far."""

    def __init__(self) -> None:
        self._pending = ""
        self._call: _JsonEnd | None = None
        self._after_call = False
        self.found = 0

    def push(self, piece: str) -> Parsed:
        """Text and calls that this piece makes certain; a call comes out whole, once its JSON has ended."""
        self._pending += piece
        text, calls = "", []
        while True:
            if self._after_call and not self._leave_call():
                break
            if self._call is None:
                start = self._pending.find(START)
                keep = overlap(self._pending, START) if start < 0 else len(self._pending) - start
                cut = len(self._pending) - keep
                text += self._pending[:cut]
                self._pending = self._pending[cut:]
                if start < 0:
                    break
                self._call = _JsonEnd(len(START))
            end = self._call.find(self._pending)
            if end is None:
                break
            whole, self._call = self._pending[:end], None
            self._pending = self._pending[end:]
            call = self._read(whole[len(START) :])
            if call is None:
                text += whole
            else:
                calls.append(call)
                self._after_call = True
        return self._tidy(text, calls)

    def flush(self) -> Parsed:
        """What is left at the end: text, unless it is the layout after a call."""
        rest, self._pending = self._pending, ""
        if self._after_call and END.startswith(rest.lstrip()):
            return Parsed("")
        return self._tidy(rest, [])

    def _leave_call(self) -> bool:
        """Passes over the end tag and the white space around it. False when more is needed to tell."""
        rest = self._pending.lstrip()
        if rest.startswith(END):
            self._pending = rest[len(END) :].removeprefix("\n")
        elif END.startswith(rest):
            return False
        self._after_call = False
        return True

    def _tidy(self, text: str, calls: list[dict[str, Any]]) -> Parsed:
        # White space around calls belongs to their layout, not to what the model said.
        return Parsed("" if self.found and not text.strip() else text, calls)

    def _read(self, body: str) -> dict[str, Any] | None:
        try:
            # Models write line breaks into strings as they are, and some grammars let them; they are escaped below.
            data = json.loads(body, strict=False)
        except (ValueError, RecursionError):
            return None
        if not isinstance(data, dict) or not isinstance(data.get("name"), str):
            return None
        arguments = data.get("arguments", data.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        index, self.found = self.found, self.found + 1
        function = {"name": data["name"], "arguments": arguments}
        return {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


class _JsonEnd:
    """Looks for the end of a JSON object that begins at `start`, reading on where it stopped."""

    def __init__(self, start: int) -> None:
        self._at = start
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, text: str) -> int | None:
        """Where the object has ended, or where it turned out that there is none; None when more is needed to tell."""
        while self._at < len(text):
            letter = text[self._at]
            self._at += 1
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == '"':
                    self._in_string = False
            elif letter == "{":
                self._depth += 1
            elif self._depth == 0:
                if not letter.isspace():
                    return self._at - 1
            elif letter == '"':
                self._in_string = True
            elif letter == "}":
                self._depth -= 1
                if self._depth == 0:
                    return self._at
        return None


def parse_tool_calls(text: str) -> Parsed:
    """All of a finished answer. Its calls have no `index`, as OpenAI's whole answers have none."""
    stream = ToolCallStream()
    parts = (stream.push(text), stream.flush())
    calls = [{k: v for k, v in call.items() if k != "index"} for part in parts for call in part.calls]
    content = "".join(part.text for part in parts)
    return Parsed(content.rstrip() if calls else content, calls)


def json_end(text: str, start: int) -> int | None:
    """Where the object that begins at `start` has ended, or where it turned out that none does; None when it hasn't."""
    return _JsonEnd(start).find(text)


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a beginning of `tag`, less than all of it."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)
