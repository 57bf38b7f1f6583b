"""What a project and a model may be called, and how a model, a step and its checkpoint are named.

The same name becomes a folder, an adapter name and part of an address, so what it may hold is narrow on purpose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .errors import InvalidName

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_name(name: str, *, what: str) -> str:
    """Return `name` when it is allowed. Raises InvalidName with a name that would be.

    `what` is the word for it in the message: "model name" or "project".
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        suggestion = re.sub(r"[^A-Za-z0-9._-]+", "-", str(name)).strip("-._")[:128]
        hint = f" {suggestion!r} would do." if _NAME.fullmatch(suggestion) else ""
        raise InvalidName(
            f"{name!r} is not a {what}: it becomes a folder, an adapter name and a part of an address, so it may hold"
            " only letters, digits, '.', '_' and '-', must begin with a letter or digit, and has at most 128"
            f" characters.{hint}"
        )
    return name


@dataclass(frozen=True, slots=True, order=True)
class ModelKey:
    """What state is keyed by: a model's name says nothing without its project."""

    project: str
    name: str

    def __post_init__(self) -> None:
        check_name(self.project, what="project")
        check_name(self.name, what="model name")

    def __str__(self) -> str:
        return f"{self.project}/{self.name}"

    def folder(self, path: Path) -> Path:
        """The model's folder under a backend's path."""
        return path / self.project / "models" / self.name


def inference_name(name: str, step: int | None = None) -> str:
    """`name` asks for the latest published step, `name@step` for that step."""
    return name if step is None else f"{name}@{step}"


def parse_inference_name(text: str) -> tuple[str, int | None]:
    """Split `name` or `name@step`. Raises InvalidName when the step is not a whole number."""
    name, at, step = text.partition("@")
    if not at:
        return name, None
    if not re.fullmatch(r"[0-9]{1,18}", step):
        raise InvalidName(f"{text!r} is not a model name: after '@' comes a step number, as in {name + '@3'!r}.")
    return name, int(step)


def adapter_name(key: ModelKey, step: int) -> str:
    """The name under which an engine holds one version of one adapter. It is never used for other weights."""
    return f"{key.project}/{key.name}@{step}"


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    """One step of one model, and the folder that holds it; where a backend keeps it elsewhere, `path` is its name
    there, which is no folder of this machine.
    """

    model: ModelKey
    step: int
    path: Path

    @property
    def inference_name(self) -> str:
        """The name a user asks for at the gateway: `name@step`."""
        return inference_name(self.model.name, self.step)

    @property
    def adapter_name(self) -> str:
        """The name under which an engine holds it: `project/name@step`."""
        return adapter_name(self.model, self.step)
