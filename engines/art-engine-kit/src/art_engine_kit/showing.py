"""Shows on stderr what is waited for and how far it is: a live line on a terminal, elsewhere a plain one now and then.

Ticks by itself, so whoever waits need not. Off a terminal a line comes every ten seconds, and none for what takes less.
Knows nothing of what is waited for.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

PLAIN_EVERY_S = 10.0
_LONGEST_NOTE = 200
# What is shown off a terminal; of waits within waits the inner one says more.
_waits: list[Shown] = []


@functools.cache
def console() -> Console:
    """The console that everything is shown on; one for all, since live lines of several would tear each other."""
    return Console(stderr=True)


def say(sentence: str) -> None:
    """Print a sentence as it is, above whatever is shown live."""
    console().print(sentence, markup=False, highlight=False, soft_wrap=True)


class Shown:
    """A context manager around a wait. `total` in `unit`s makes it a bar; unit "B" stands for bytes.

    May be nested, and updated from any thread. `enabled=False` shows nothing.
    """

    def __init__(self, what: str, *, total: float | None = None, unit: str = "", enabled: bool = True) -> None:
        self._what, self._total, self._unit, self._enabled = what, total, unit, enabled
        self._done, self._note = 0.0, ""
        self._live: tuple[Progress, TaskID] | None = None
        self._over = threading.Event()
        self._begun = 0.0

    def __enter__(self) -> Self:
        self._begun = time.monotonic()
        if not self._enabled:
            return self
        if console().is_interactive:
            progress = Progress(
                SpinnerColumn(), TextColumn("{task.description}"), _Bar(bar_width=30), _Count(), TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[note]}[/]"), console=console(), transient=True,
            )  # fmt: skip
            task = progress.add_task(escape(self._what), total=self._total, note="", unit=self._unit)
            self._live = progress, task
            progress.start()
        else:
            _waits.append(self)
            threading.Thread(target=self._tick, name=f"shows {self._what}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._live is not None:
            self._live[0].stop()
        if self in _waits:
            _waits.remove(self)

    def update(
        self,
        what: str | None = None,
        *,
        done: float | None = None,
        total: float | None = None,
        note: str | None = None,
    ) -> None:
        """Say what is waited for now, how much of it is done, and whatever else there is to say in a few words."""
        self._what = self._what if what is None else what
        self._done = self._done if done is None else done
        self._total = self._total if total is None else total
        self._note = self._note if note is None else " ".join(note.split())[:_LONGEST_NOTE]
        if self._live is not None:
            progress, task = self._live
            note = escape(self._note[: max(20, console().width // 2)])
            progress.update(task, description=escape(self._what), completed=self._done, total=self._total, note=note)

    def line(self) -> str:
        """What a plain line says now."""
        parts = [counted(self._done, self._total, self._unit)] if self._total is not None or self._unit else []
        parts.append(f"{time.monotonic() - self._begun:.0f} s")
        return f"{self._what}: {', '.join(parts)}{f' | {self._note}' if self._note else ''}"

    def _tick(self) -> None:
        while not self._over.wait(PLAIN_EVERY_S):
            if _waits[-1:] == [self]:
                print(self.line(), file=sys.stderr, flush=True)


def counted(done: float, total: float | None, unit: str) -> str:
    """Such as "12 of 64 rows" or "45.2 of 92.9 MB"."""
    if unit == "B":
        return f"{done / 1e6:.1f} MB" if total is None else f"{min(done, total) / 1e6:.1f} of {total / 1e6:.1f} MB"
    words = f"{done:g}" if total is None else f"{done:g} of {total:g}"
    return f"{words} {unit}".strip()


class _Bar(BarColumn):
    def render(self, task: Task) -> Text:  # type: ignore[override]
        return Text("") if task.total is None else super().render(task)  # type: ignore[return-value]


class _Count(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        return Text(counted(task.completed, task.total, unit) if task.total is not None or unit else "")
