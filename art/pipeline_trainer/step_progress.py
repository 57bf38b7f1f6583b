"""Hears how far a training step is, so that a long one isn't taken for a stall. Knows one hook and the status."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from art_core import PolicyModel, hookimpl, installed_plugins

from ..model import TrainableModel
from .status import StatusReporter


class _Listener:
    art_api = 1

    def __init__(self, model: TrainableModel, status: StatusReporter) -> None:
        self._model, self._status = model, status

    @hookimpl
    def art_gradient_step(self, model: PolicyModel, step: int, done: int, total: int) -> None:
        if (model.project, model.name) == (self._model.project, self._model.name):
            self._status.does("trainer", f"gradient step {done} of {total} of step {step}")
            self._status.progress()


@contextmanager
def step_progress(model: TrainableModel, status: StatusReporter) -> Iterator[None]:
    """Have the status told of each gradient step of the model, in the block."""
    name = f"pipeline-{model.project}-{model.name}"
    installed_plugins().register(_Listener(model, status), name)
    try:
        yield
    finally:
        installed_plugins().unregister(name)
