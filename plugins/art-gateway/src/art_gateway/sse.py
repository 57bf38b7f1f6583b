"""Server-sent events, as engines stream them: bytes in, whole events out. Knows nothing of what the events say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_END = re.compile(rb"\r?\n\r?\n")
_LONGEST_END = 4
DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its bytes as they came, its `data` (None when it has none, as a comment), its other lines."""

    raw: bytes
    data: bytes | None
    other: tuple[bytes, ...] = ()

    def with_data(self, data: bytes) -> bytes:
        """The event's bytes with other data of one line in it."""
        return b"".join((*(line + b"\n" for line in self.other), b"data: ", data, b"\n\n"))


class EventReader:
    """Cuts a stream of bytes into events, wherever its pieces were cut."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0

    @property
    def left(self) -> int:
        """How many bytes of an unfinished event are held."""
        return len(self._buffer)

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that `piece` completes."""
        self._buffer += piece
        start = 0
        while match := _END.search(self._buffer, max(start, self._searched)):
            raw = bytes(self._buffer[start : match.end()])
            start = self._searched = match.end()
            if raw.strip():
                yield _read(raw)
        del self._buffer[:start]
        # An end may be cut in two, so its first bytes are looked at again.
        self._searched = max(0, len(self._buffer) - _LONGEST_END)


def _read(raw: bytes) -> Event:
    data: list[bytes] = []
    other: list[bytes] = []
    for line in raw.splitlines():
        if line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
        elif line:
            other.append(line)
    return Event(raw, b"\n".join(data) if data else None, tuple(other))
