"""Hears the hooks of a training step, and tells the worker which phase it is in and how far. Knows hooks and nothing of
jobs.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Protocol

from art_core import hookimpl


class Told(Protocol):
    """Who wants to know."""

    async def enter(self, phase: str, model: Any) -> None:
        """The step of this model is in this phase now."""

    async def advance(self, model: Any, done: int, total: int, metrics: dict[str, float]) -> None:
        """The optimizer has taken so many of its steps for this model."""


class StepHooks:
    """A plugin, to be registered by hand."""

    art_api = 1

    def __init__(self, told: Told) -> None:
        self._told = told

    @hookimpl
    def art_before_train(self, model: Any) -> Awaitable[None]:
        """Training begins."""
        return self._told.enter("training", model)

    @hookimpl
    def art_gradient_step(self, model: Any, done: int, total: int, metrics: dict[str, float]) -> Awaitable[None]:
        """Training goes on."""
        return self._told.advance(model, done, total, metrics)

    @hookimpl
    def art_checkpoint_saved(self, model: Any) -> Awaitable[None]:
        """Training has ended, and its checkpoint is on disk."""
        return self._told.enter("saving", model)

    @hookimpl
    def art_before_publish_checkpoint(self, model: Any) -> Awaitable[None]:
        """Publishing begins."""
        return self._told.enter("publishing", model)
