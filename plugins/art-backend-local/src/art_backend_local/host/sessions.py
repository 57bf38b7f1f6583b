"""The clients of a host: who is connected, and what each holds that must be let go when it is gone.

A session lasts as long as its connection, so a client that is killed lets go of everything at once. Knows nothing of
HTTP or of models; what is held is a function that lets it go.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from uuid import uuid4

from art_core.errors import BackendUnreachable


class Session:
    """One connected client. `events` are sentences to tell it."""

    def __init__(self) -> None:
        self.id = uuid4().hex
        self.events: asyncio.Queue[str] = asyncio.Queue(maxsize=1000)
        self._held: dict[str, Callable[[], None]] = {}

    def hold(self, name: str, let_go: Callable[[], None]) -> None:
        """Remember how to let something go, under a name of its own."""
        self._held[name] = let_go

    def let_go(self, name: str) -> None:
        """Let one thing go. Unknown names are those let go before."""
        let_go = self._held.pop(name, None)
        if let_go is not None:
            let_go()

    def end(self) -> None:
        """Let everything go."""
        with ExitStack() as stack:
            while self._held:
                stack.callback(self._held.popitem()[1])


class Sessions:
    """All sessions of a host, and when it was last used."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._last_used = time.monotonic()

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def idle_s(self) -> float:
        """Seconds since the last use; 0 while a client is connected."""
        return 0.0 if self._sessions else time.monotonic() - self._last_used

    def used(self) -> None:
        """Somebody asked for something just now."""
        self._last_used = time.monotonic()

    def begin(self) -> Session:
        """A client has connected."""
        session = Session()
        self._sessions[session.id] = session
        self.used()
        return session

    def end(self, session: Session) -> None:
        """Its connection is gone."""
        self._sessions.pop(session.id, None)
        self.used()
        session.end()

    def get(self, session_id: str) -> Session:
        """A connected client's session. Raises BackendUnreachable for one whose connection has gone."""
        session = self._sessions.get(session_id)
        if session is None:
            raise BackendUnreachable("this client's connection to its host was lost meanwhile; ask again.")
        return session

    def tell_all(self, sentence: str) -> None:
        """Tell every connected client; one that doesn't listen misses it."""
        for session in self._sessions.values():
            if not session.events.full():
                session.events.put_nowait(sentence)
