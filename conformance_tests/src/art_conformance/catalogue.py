"""The list of all requirements, as the code has them and as each revision froze them.

A frozen set is what an implementation was held against; it never changes. New requirements make a new revision.
"""

from __future__ import annotations

import json
from importlib import import_module
from importlib.resources import files
from typing import Any

from .requirements import Requirement, checks_of

REVISION = 3
# The module of each suite, which is imported when it is asked for.
SUITES = {
    "PluginConformance": "plugin_suite",
    "InferenceEngineConformance": "inference_suite",
    "TrainingEngineConformance": "training_suite",
    "PublicationConformance": "publication_suite",
    "BackendConformance": "backend_suite",
    "TrackerConformance": "tracker_suite",
}


def suite(name: str) -> type:
    """A suite by its name."""
    found: type = getattr(import_module(f".{SUITES[name]}", __package__), name)
    return found


def requirements_of(name: str) -> list[Requirement]:
    """The requirements of one suite, by id."""
    return [requirement for _, _, requirement in checks_of(suite(name))]


def requirements() -> dict[str, list[Requirement]]:
    """The requirements of every suite, by the suite's name. Raises ValueError when two suites share an id."""
    listed = {name: requirements_of(name) for name in SUITES}
    seen: dict[str, str] = {}
    for name, of_suite in listed.items():
        for requirement in of_suite:
            if requirement.id in seen:
                raise ValueError(f"{requirement.id} is in {seen[requirement.id]} and in {name}")
            seen[requirement.id] = name
    return listed


def as_json() -> dict[str, Any]:
    """The whole list in the form of the frozen sets."""
    return {
        "revision": REVISION,
        "suites": {name: [requirement.as_json() for requirement in listed] for name, listed in requirements().items()},
    }


def frozen(revision: int = REVISION) -> dict[str, Any]:
    """The set of a revision. Raises FileNotFoundError for one that never was."""
    text = files(__package__).joinpath("frozen", f"{revision}.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def as_text() -> str:
    """The list for people."""
    lines = [f"art-conformance requirements, revision {REVISION}"]
    for name, listed in requirements().items():
        lines += ["", name]
        for requirement in listed:
            declared = "" if requirement.needs is None else f" (when {requirement.needs.value} is declared)"
            live = " [live]" if requirement.live else ""
            lines.append(f"  {requirement.id}  {requirement.level.value:<6}  {requirement.text}{declared}{live}")
    return "\n".join(lines)
