"""Turns sampled token ids into text piece by piece, without ever giving out half a character, and finds stop strings.

Knows a tokenizer's decode and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Decodes(Protocol):
    """The one thing needed of a tokenizer."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids."""


class TextStream:
    """The growing text of one sequence. `text` is all that was given out so far."""

    def __init__(self, tokenizer: Decodes, stops: Sequence[str] = (), *, include_stop: bool = False) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._include_stop = include_stop
        self._ids: list[int] = []
        # Decoding starts a little before what is new: tokenizers join pieces by what stands before them.
        self._start = 0
        self._read = 0
        self._pending = ""
        self._stopped = False
        self.text = ""

    def push(self, token: int) -> tuple[str, str | None]:
        """The text that this token makes certain, and the stop string that it completed.

        With stop strings, text that may be the beginning of one is held back until it is not.
        """
        self._ids.append(token)
        known = self._decode(self._start, self._read)
        now = self._decode(self._start, len(self._ids))
        if len(now) <= len(known) or now.endswith("\ufffd"):
            return "", None
        self._start, self._read = self._read, len(self._ids)
        self._pending += now[len(known) :]
        return self._settle()

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
        held = max((_overlap(self._pending, stop) for stop in self._stops), default=0)
        piece = self._pending[: len(self._pending) - held]
        self._pending = self._pending[len(piece) :]
        self.text += piece
        return piece, None

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
