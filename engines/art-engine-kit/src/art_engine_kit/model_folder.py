"""Where the files of one model lie, under a backend's path. Knows names and nothing of what is in the files.

What is said of a step, such as that it was published, stands beside the step's folder, which is sealed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self
from uuid import uuid4

from art_core import CheckpointRef, ModelKey

from .checkpoint_folder import step_folder


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """The folder of one model."""

    key: ModelKey
    path: Path

    @classmethod
    def under(cls, path: Path, key: ModelKey) -> Self:
        """The model's folder under a backend's path."""
        return cls(key, key.folder(path))

    @property
    def checkpoints(self) -> Path:
        """A folder for each step."""
        return self.path / "checkpoints"

    @property
    def description(self) -> Path:
        """What the model is made of: `model.json`."""
        return self.path / "model.json"

    @property
    def jobs(self) -> Path:
        """The trajectories of the step under way."""
        return self.path / "jobs"

    @property
    def served_copies(self) -> Path:
        """Adapters in the form that some servers need."""
        return self.path / "served"

    def checkpoint(self, step: int) -> CheckpointRef:
        """The checkpoint of a step, whether or not it is there."""
        return CheckpointRef(self.key, step, step_folder(self.checkpoints, step))

    def published(self, step: int) -> Path:
        """There when the step was published once."""
        return self._beside(step, "published")

    def not_kept(self, step: int) -> Path:
        """There when the step goes once a later one is served."""
        return self._beside(step, "not_kept")

    def place_aside(self, step: int) -> Path:
        """A place for a checkpoint that may not be published, never used before."""
        return self._beside(step, f"refused-{uuid4().hex[:8]}")

    def forget_marks(self, step: int) -> None:
        """Take away what is said of a step; call it before the step itself goes."""
        for mark in (self.published(step), self.not_kept(step)):
            mark.unlink(missing_ok=True)

    def _beside(self, step: int, what: str) -> Path:
        return self.checkpoints / f"{step_folder(self.checkpoints, step).name}.{what}"
