"""Shows the user what the host is at: what it waits for, and how far a training step is.

Knows the events of the control API; how things are shown is `art_engine_kit.showing`'s. Decides nothing.
"""

from __future__ import annotations

from typing import Any

from art_engine_kit.showing import Shown

JSON = dict[str, Any]


class Waiting(Shown):
    """A context manager around a wait. Nothing is printed when `enabled` is false."""

    def __init__(self, what: str, *, enabled: bool = True) -> None:
        super().__init__(what, enabled=enabled)
        self._about = what

    def show(self, event: JSON) -> None:
        """Show a "status" event; others are ignored."""
        if event["event"] == "status":
            self.update(f"{self._about}: waiting for {event['waiting_for']}", note=event["last_line"])


class TrainingBar(Waiting):
    """The bar of one training step, over packed rows, once they are known."""

    def show(self, event: JSON) -> None:
        """Show one event of the host or of the worker."""
        super().show(event)
        kind = event["event"]
        if kind == "started":
            note = f"{event['trained_tokens']} tokens to train"
            self.update(self._about, done=0, total=event["num_rows"], note=note)
        elif kind == "progress":
            self.update(done=event["done"], total=event["total"])
        elif kind == "gradient_step":
            loss = event["metrics"].get("loss/train")
            if loss is not None:
                self.update(note=f"loss {loss:.4g}")
