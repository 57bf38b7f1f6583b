"""Finds the interpreter that runs an engine: the client's own, one the user runs, or that of its environment.

Looks only at metadata and files, and imports no engine. `python_for` may have a missing environment made.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from art_engine_kit.environment import Flavour

from .places import EngineSpec, EnvironmentMissing, environment_for, environment_spec


@dataclass(frozen=True, kw_only=True)
class EnginePython:
    """An interpreter that runs an engine, and why it is this one."""

    path: str
    why: str


def python_for(
    spec: EngineSpec, *, python: str | Path | None = None, flavour: Flavour | None = None, auto_install: bool = False
) -> str:
    """The interpreter that an engine's launch plan is to run.

    In this order: `python`, the user's own; this process's interpreter, when the engine needs no environment or is
    importable here already; the environment in the cache. When that is missing, `auto_install` makes it, which takes
    minutes and shows its progress, so call it in a thread. Raises EnvironmentMissing with the command to run.
    """
    try:
        return locate(spec, python=python, flavour=flavour).path
    except EnvironmentMissing as missing:
        if not auto_install or missing.environment is None:
            raise
        from .install import install

        return str(install(missing.environment))


def locate(spec: EngineSpec, *, python: str | Path | None = None, flavour: Flavour | None = None) -> EnginePython:
    """Like `python_for` without `auto_install`, and says why it is this interpreter."""
    if python is not None:
        return EnginePython(path=_own_interpreter(spec.name, python), why="given by the user")
    environment = environment_spec(spec)
    if environment is None:
        return EnginePython(path=sys.executable, why="this environment; the engine needs no other")
    here = first_met(environment.provided_by)
    if here is not None and flavour is None:
        return EnginePython(path=sys.executable, why=f"this environment, which holds {here}")
    wanted = environment_for(spec, flavour)
    found = wanted.python()
    if found is None:
        raise EnvironmentMissing(
            f"engine {spec.name} runs in an environment of its own, and that isn't installed yet (flavour"
            f" {wanted.flavour}). Install it: {wanted.install_command}\n"
            "Or give auto_install=True to have it done now, or python= with the interpreter of an environment of yours"
            f" that holds {environment.provided_by[0]}.",
            wanted,
        )
    return EnginePython(path=str(found), why=f"its environment, flavour {wanted.flavour}")


def first_met(requirements: Iterable[str]) -> str | None:
    """The first of these requirements that this process's environment meets, as "name version". Imports nothing."""
    for line in requirements:
        requirement = Requirement(line)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        if requirement.specifier.contains(version, prereleases=True):
            return f"{requirement.name} {version}"
    return None


def _own_interpreter(engine: str, python: str | Path) -> str:
    # Not resolved: a virtual environment's interpreter is a link, and what it links to knows nothing of it.
    found = shutil.which(os.path.expanduser(python))
    if found is None:
        raise EnvironmentMissing(f"python={str(python)!r} for engine {engine} is no program that can be run here.")
    return os.path.abspath(found)
