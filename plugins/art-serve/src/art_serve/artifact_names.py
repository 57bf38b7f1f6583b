"""The name that a model is asked for by: `wandb-artifact:///entity/project/name`, with `:step3` for a certain step."""

from __future__ import annotations

import re
from dataclasses import dataclass

SCHEME = "wandb-artifact:///"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
#: A name of an entity, a project or a model, for the OpenAPI page; `art_core.check_name` is what judges it.
NAME_PATTERN = f"^{_NAME}$"
#: A whole artifact name, for the OpenAPI page.
ARTIFACT_PATTERN = rf"^{SCHEME}{_NAME}/{_NAME}/{_NAME}(:(latest|step[0-9]{{1,9}}))?$"
_WHOLE = re.compile(
    rf"{SCHEME}(?P<entity>{_NAME})/(?P<project>{_NAME})/(?P<name>{_NAME})(?::(?:latest|step(?P<step>[0-9]{{1,9}})))?",
    re.ASCII,
)


@dataclass(frozen=True)
class ArtifactName:
    """A model and perhaps a step of it. `str()` is the name."""

    entity: str
    project: str
    name: str
    step: int | None = None

    def __str__(self) -> str:
        step = "" if self.step is None else f":step{self.step}"
        return f"{SCHEME}{self.entity}/{self.project}/{self.name}{step}"


def parse_artifact_name(text: str) -> ArtifactName | None:
    """What a name says; None for a text that is no such name. `:latest` is the same as no step."""
    found = _WHOLE.fullmatch(text)
    if found is None:
        return None
    step = None if found["step"] is None else int(found["step"])
    return ArtifactName(found["entity"], found["project"], found["name"], step)
