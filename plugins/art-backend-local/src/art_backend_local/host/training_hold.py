"""Who is training a model: one step of one client at a time, from before its first hook to its end, however it ends.

A hold is named by the client, so that it can be let go by a client that never heard whether it got it. Knows tasks;
knows nothing of what a step does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from art_core import ModelKey
from art_core.errors import BackendUnreachable, ModelBusy

from .sessions import Session

# A cancelled job leaves its worker between two packed rows; a step that asks meanwhile waits for it.
LEAVING_LIMIT_S = 180.0


class TrainingHold:
    """A client's hold on a model. `step` is the one it makes, `saved` says that it is on disk and nobody has asked to
    publish it yet.

    It ends once it was let go and the work under it, cancelled or not, has left nothing behind.
    """

    def __init__(self, name: str, session: str) -> None:
        self.name, self.session = name, session
        self.step: int | None = None
        self.saved = self.discarded = False
        self.let_go = False
        self.ended = asyncio.Event()
        self._work: set[asyncio.Task[object]] = set()

    def owns(self, work: asyncio.Task[object]) -> None:
        """Not to end before this work does."""
        self._work.add(work)
        work.add_done_callback(self._done)

    def release(self) -> None:
        """Let it go. A second call does nothing."""
        self.let_go = True
        self._end_if_over()

    def _done(self, work: asyncio.Task[object]) -> None:
        self._work.discard(work)
        self._end_if_over()

    def _end_if_over(self) -> None:
        if self.let_go and not self._work:
            self.ended.set()


class TrainingTurn:
    """One model's turn: at most one hold at a time."""

    def __init__(self, key: ModelKey) -> None:
        self._key = key
        self._hold: TrainingHold | None = None
        self._gone: list[str] = []

    @property
    def taken(self) -> bool:
        """True while a step is under way or on its way out."""
        return self._hold is not None and not self._hold.ended.is_set()

    async def take(self, name: str, session: Session) -> TrainingHold:
        """Take the turn, or keep it. A step that was cancelled is waited for; raises ModelBusy while one goes on."""
        while (hold := self._hold) is not None and not hold.ended.is_set():
            if hold.name == name and not hold.let_go:
                return hold
            if not hold.let_go:
                who = "this client" if hold.session == session.id else "another client"
                raise ModelBusy(
                    f"{self._key} is being trained by {who}. One step at a time: two writers of one adapter would"
                    " overwrite each other. Wait for that step, or use another model name."
                )
            try:
                await asyncio.wait_for(hold.ended.wait(), LEAVING_LIMIT_S)
            except TimeoutError:
                raise ModelBusy(
                    f"a cancelled step of {self._key} has not left its training worker for {LEAVING_LIMIT_S:g} s."
                    " Train again later, or end the host: art down."
                ) from None
        if name in self._gone:
            raise BackendUnreachable(f"the step of {self._key} was given up before it began.")
        hold = self._hold = TrainingHold(name, session.id)
        session.hold(name, hold.release)
        return hold

    def of(self, name: str) -> TrainingHold:
        """The hold of that name. Raises BackendUnreachable when it was let go meanwhile, as with a lost connection."""
        if self._hold is None or self._hold.name != name or self._hold.let_go:
            raise BackendUnreachable(f"the step of {self._key} was given up meanwhile; train it again.")
        return self._hold

    async def discard(self, name: str, delete: Callable[[int], Awaitable[None]]) -> None:
        """Delete the step that was saved under a hold and not yet published; one that is being saved goes later."""
        hold = self._hold
        if hold is not None and hold.name == name:
            hold.discarded = True
            if hold.saved and hold.step is not None:
                await delete(hold.step)

    def release(self, name: str) -> None:
        """Let a hold go, also one whose request is still on its way."""
        self._gone = [*self._gone[-100:], name]
        if self._hold is not None and self._hold.name == name:
            self._hold.release()
