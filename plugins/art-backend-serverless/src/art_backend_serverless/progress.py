"""Shows on stderr which phase a job is in and how far: a live line with a bar on a terminal, elsewhere a plain line for
each phase and one now and then while it lasts.

Knows phases and numbers; knows no job and no service.
"""

from __future__ import annotations

import asyncio
import functools
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

PLAIN_EVERY_S = 10.0
_LONGEST_NOTE = 200


@functools.cache
def _console() -> Console:
    return Console(stderr=True)


class JobProgress:
    """A context manager around a job. `enabled=False` shows nothing, `brief` no line for what takes less than ten
    seconds.
    """

    def __init__(self, what: str, *, enabled: bool = True, brief: bool = False) -> None:
        self._what, self._enabled, self._brief = what, enabled, brief
        self._phase, self._note = "", ""
        self._done, self._total = 0.0, 0.0
        self._begun = 0.0
        self._live: tuple[Progress, TaskID] | None = None
        self._tick: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._begun = time.monotonic()
        if not self._enabled:
            return self
        if _console().is_interactive:
            progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[counted]}"),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[note]}[/]"),
                console=_console(),
                transient=True,
            )
            task = progress.add_task(escape(self._what), total=None, note="", counted="")
            self._live = progress, task
            progress.start()
        else:
            self._tick = asyncio.get_running_loop().call_later(PLAIN_EVERY_S, self._again)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tick is not None:
            self._tick.cancel()
        if self._live is not None:
            self._live[0].stop()

    def phase(self, phase: str, note: str = "", *, line: bool = True) -> None:
        """The job is in this phase now, such as "queued, place 2". The same one again changes only the note. Without
        `line` it gets none of its own off a terminal.
        """
        new = phase != self._phase
        self._phase, self._note = phase, _in_short(note)
        if new:
            self._done = self._total = 0.0
            if line and not self._brief:
                self._print()
        self._redraw()

    def advance(self, done: float, total: float, note: str = "") -> None:
        """How much of the phase is done; a total of 0 means that nobody knows of how much."""
        self._done, self._total = done, total
        self._note = _in_short(note) or self._note
        self._redraw()

    def note(self, note: str) -> None:
        """Say something beside the phase, such as why it takes long."""
        if _in_short(note) != self._note:
            self._note = _in_short(note)
            self._print()
        self._redraw()

    def say(self, sentence: str) -> None:
        """Print a sentence that stays."""
        if self._enabled:
            _console().print(sentence, markup=False, highlight=False, soft_wrap=True)

    def _line(self) -> str:
        counted = f", {_counted(self._done, self._total)}" if self._done or self._total else ""
        note = f" | {self._note}" if self._note else ""
        return f"{self._what}: {self._phase}{counted}, {time.monotonic() - self._begun:.0f} s{note}"

    def _print(self) -> None:
        if self._enabled and self._live is None:
            print(self._line(), file=sys.stderr, flush=True)

    def _again(self) -> None:
        self._print()
        self._tick = asyncio.get_running_loop().call_later(PLAIN_EVERY_S, self._again)

    def _redraw(self) -> None:
        if self._live is None:
            return
        progress, task = self._live
        progress.update(
            task,
            description=escape(f"{self._what}: {self._phase}"),
            completed=self._done,
            total=self._total or None,
            counted=_counted(self._done, self._total) if self._done or self._total else "",
            note=escape(self._note[: max(20, _console().width // 2)]),
        )


def _in_short(note: str) -> str:
    return " ".join(note.split())[:_LONGEST_NOTE]


def _counted(done: float, total: float) -> str:
    if total > 100_000:
        return f"{100 * done / total:.0f}%"
    return f"{done:g} of {total:g}" if total else f"{done:g}"
