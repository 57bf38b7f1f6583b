"""Shows the user what is being waited for: a live line on a terminal, a plain line now and then elsewhere.

Knows the events of the control API and how to print; decides nothing.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.status import Status

JSON = dict[str, Any]
_PLAIN_EVERY_S = 10.0


class Waiting:
    """A context manager around a wait. `show` takes "status" events; nothing is printed when `enabled` is false."""

    def __init__(self, what: str, *, enabled: bool = True) -> None:
        self._what = what
        self._enabled = enabled
        self._console = Console(stderr=True)
        self._status: Status | None = None
        self._begun = self._printed = time.monotonic()

    def __enter__(self) -> Self:
        if self._enabled and self._console.is_terminal:
            self._status = self._console.status(escape(self._what))
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, event: JSON) -> None:
        """Show a "status" event; others are ignored."""
        if event.get("event") != "status" or not self._enabled:
            return
        line = f"{self._what}: waiting for {event['waiting_for']}, {time.monotonic() - self._begun:.0f} s"
        if event["last_line"]:
            line += f" | {event['last_line'].strip()}"
        if self._status is not None:
            self._status.update(escape(line[: max(40, self._console.width - 4)]))
        elif time.monotonic() - self._printed > _PLAIN_EVERY_S:
            self._printed = time.monotonic()
            print(line[:300], file=sys.stderr, flush=True)


class TrainingBar:
    """The bar of one training step, drawn as tqdm does, over packed rows."""

    def __init__(self, description: str, *, enabled: bool = True) -> None:
        self._description = description
        self._enabled = enabled
        self._bar: Any = None
        self._waiting = Waiting(description, enabled=enabled)

    def __enter__(self) -> Self:
        self._waiting.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.__exit__(kind, error, trace)
        if self._bar is not None:
            self._bar.close()

    def show(self, event: JSON) -> None:
        """Show one event of the host or of the worker."""
        if not self._enabled:
            return
        kind = event["event"]
        if kind == "status":
            self._waiting.show(event)
        elif kind == "started":
            self._waiting.__exit__(None, None, None)
            from tqdm import tqdm  # type: ignore[import-untyped]

            self._bar = tqdm(desc=self._description, total=event["num_rows"], dynamic_ncols=True, unit="row")
            self._bar.set_postfix_str(f"{event['trained_tokens']} tokens to train")
        elif kind == "progress" and self._bar is not None:
            self._bar.total = event["total"]
            self._bar.update(event["done"] - self._bar.n)
        elif kind == "gradient_step" and self._bar is not None:
            loss = event["metrics"].get("loss/train")
            if loss is not None:
                self._bar.set_postfix_str(f"loss {loss:.4g}")
