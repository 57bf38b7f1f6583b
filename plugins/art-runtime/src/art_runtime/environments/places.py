"""Which environment an engine has in which flavour, and where in ART's cache it lies, installed or not.

Knows cards, hashes and files; finds no interpreter of the user's, and makes and removes nothing.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from art_core import ArtError, InferenceEngineSpec, TrainingEngineSpec
from art_core.errors import PluginError, did_you_mean
from art_core.registry import instantiate
from art_engine_kit.environment import EnvironmentSpec, Flavour, FlavourSpec
from art_engine_kit.live_folders import files_below
from art_engine_kit.user_folders import cache_dir

from ..devices import accelerators

EngineSpec = InferenceEngineSpec | TrainingEngineSpec
MARKER = "environment.json"


class EnvironmentMissing(ArtError, RuntimeError):
    """An engine has no interpreter to run in yet; the message holds the one command that makes it.

    `environment` is the one that is missing; None when installing can't help.
    """

    def __init__(self, message: str, environment: EngineEnvironment | None = None) -> None:
        super().__init__(message)
        self.environment = environment


@dataclass(frozen=True, kw_only=True)
class EngineEnvironment:
    """The environment of one engine in one flavour, installed or not.

    `folder` is its place in the cache; its name holds a hash of everything that goes in, so other requirements are
    another folder.
    """

    engine: str
    flavour: Flavour
    spec: FlavourSpec
    environment: EnvironmentSpec
    folder: Path

    @property
    def marker(self) -> Path:
        """The file that is written last: without it, whatever lies in the folder is not an environment."""
        return self.folder / MARKER

    def python(self) -> Path | None:
        """Its interpreter; None when it isn't installed, or was damaged since."""
        try:
            interpreter = self.folder / json.loads(self.marker.read_bytes())["venv"] / "bin" / "python"
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return interpreter if os.access(interpreter, os.X_OK) else None

    def facts(self) -> dict[str, Any]:
        """What was written down when it was installed: versions, bytes, seconds; empty when it isn't."""
        return {} if self.python() is None else dict(json.loads(self.marker.read_bytes()))

    @property
    def install_command(self) -> str:
        """The command that makes it."""
        flavour = "" if self.flavour == machine_flavour() else f" --flavour {self.flavour}"
        return f"art engines install {self.engine}{flavour}"


def engine_folder(engine: str) -> Path:
    """Where all environments of an engine lie, those of older requirements too."""
    return cache_dir() / "engines" / engine


def machine_flavour() -> Flavour:
    """ "cuda" where this process may use a GPU, else "cpu". May take a second at the first call."""
    return "cuda" if accelerators() else "cpu"


def flavour_of(environment: EnvironmentSpec, flavour: Flavour | None) -> Flavour:
    """The flavour that was asked for; None is this machine's, or "cpu" for an engine that knows no other."""
    if flavour is None and environment.flavours.keys() == {"cpu"}:
        return "cpu"
    return flavour or machine_flavour()


def environment_spec(spec: EngineSpec) -> EnvironmentSpec | None:
    """What a card says of its environment, imported; None for an engine that lives in the client's.

    Raises PluginError when it can't be imported.
    """
    if spec.environment is None:
        return None
    module, _, attribute = spec.environment.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise PluginError(
            f"the environment of engine {spec.name!r}, {spec.environment}, is not there: {error}"
        ) from error
    if not isinstance(found, EnvironmentSpec):
        raise PluginError(f"the environment of engine {spec.name!r}, {spec.environment}, is no EnvironmentSpec.")
    return found


def environment_for(spec: EngineSpec, flavour: Flavour | None = None) -> EngineEnvironment:
    """An engine's environment in a flavour (None: as `flavour_of` has it), whether it is installed or not.

    Raises EnvironmentMissing for an engine that needs none, and for a flavour that it doesn't have.
    """
    environment = environment_spec(spec)
    if environment is None:
        raise EnvironmentMissing(
            f"engine {spec.name} needs no environment of its own: it runs in the one that it is installed in."
        )
    chosen = flavour_of(environment, flavour)
    if chosen not in environment.flavours:
        raise EnvironmentMissing(
            f"engine {spec.name} has no flavour {chosen!r}.{did_you_mean(chosen, environment.flavours)} It has:"
            f" {', '.join(environment.flavours)}."
        )
    wanted = environment.flavours[chosen]
    folder = engine_folder(spec.name) / f"{chosen}-{_key(wanted)}"
    return EngineEnvironment(engine=spec.name, flavour=chosen, spec=wanted, environment=environment, folder=folder)


def engine_for(spec: EngineSpec, flavour: Flavour | None = None) -> Any:
    """Make an engine from its card, in a flavour (None: this machine's) when it has flavours.

    It declares what it can do on such a machine, which may be more than its card says. Raises PluginError.
    """
    return instantiate(spec) if spec.environment is None else instantiate(spec, flavour=flavour or machine_flavour())


def _key(spec: FlavourSpec) -> str:
    projects = {
        f"{project.name}/{file.relative_to(project).as_posix()}": hashlib.sha256(file.read_bytes()).hexdigest()
        for project in spec.local_projects
        for file in sorted(file for file, _ in files_below(project))
    }
    content = [
        *(spec.requirements, spec.without_dependencies, projects, spec.uninstall),
        *(sys.version_info[:2], sys.implementation.name, platform.machine()),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
