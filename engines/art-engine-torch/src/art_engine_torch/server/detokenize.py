"""Turns sampled token ids into text piece by piece, without ever giving out half a character, and finds stop strings.

Knows a tokenizer's decode and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from art_engine_kit.hermes_calls import ToolCallStream, overlap


class Decodes(Protocol):
    """The one thing needed of a tokenizer."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids."""


class FirstCall:
    """True once the text that it was given, piece by piece, holds a whole tool call."""

    def __init__(self) -> None:
        self._calls = ToolCallStream()

    def __call__(self, piece: str) -> bool:
        """With one more piece."""
        self._calls.push(piece)
        return self._calls.found > 0


class TextStream:
    """The growing text of one sequence. `text` is all that was given out so far.

    `until` is given every piece and says when the text is to end.
    """

    def __init__(
        self,
        tokenizer: Decodes,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        until: Callable[[str], bool] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._include_stop = include_stop
        self._until = until
        self._ids: list[int] = []
        # Decoding starts a little before what is new: tokenizers join pieces by what stands before them.
        self._start = 0
        self._read = 0
        self._pending = ""
        self._stopped = False
        self.text = ""

    def push(self, token: int) -> tuple[str, str | None]:
        """The text that this token makes certain, and the stop string that it completed, empty where `until` ended it.

        With stop strings, text that may be the beginning of one is held back until it is not.
        """
        self._ids.append(token)
        known = self._decode(self._start, self._read)
        now = self._decode(self._start, len(self._ids))
        if len(now) <= len(known) or now.endswith("\ufffd"):
            return "", None
        self._start, self._read = self._read, len(self._ids)
        self._pending += now[len(known) :]
        piece, stop = self._settle()
        if stop is None and self._until is not None and self._until(piece):
            stop = ""
        return piece, stop

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        if self._stopped:
            return ""
        known = self._decode(self._start, self._read)
        rest = self._pending + self._decode(self._start, len(self._ids))[len(known) :]
        self._pending, self._read = "", len(self._ids)
        self.text += rest
        return rest

    def _settle(self) -> tuple[str, str | None]:
        found = [(at, stop) for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            piece = self._pending[: at + len(stop) if self._include_stop else at]
            self._pending, self._stopped = "", True
            self.text += piece
            return piece, stop
        held = max((overlap(self._pending, stop) for stop in self._stops), default=0)
        piece = self._pending[: len(self._pending) - held]
        self._pending = self._pending[len(piece) :]
        self.text += piece
        return piece, None

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)
