"""Which models report to a tracker. Knows a model's fields and no tracker.

`model.log` asks only the trackers that `report_metrics` names; the hooks of checkpoints reach every plugin, which
therefore has to ask itself.
"""

from __future__ import annotations

from typing import Protocol


class LoggedModel(Protocol):
    """What a tracker knows of a model. Models that are not trained are logged too."""

    name: str
    project: str
    entity: str | None
    base_path: str


def reports_to(model: LoggedModel, tracker: str, *, unasked: bool = True) -> bool:
    """Whether a model reports to the plugin of this name: what its `report_metrics` says, or `unasked` when that says
    nothing.
    """
    # `art.Model` has the field; a backend may be handed models that have no more than the protocol's members.
    named: list[str] | None = getattr(model, "report_metrics", None)
    return unasked if named is None else tracker in named
