"""What a cell's outcome is true for: versions, and a hash of the sources that are installed.

Knows installed distributions and the environments of engines; imports none of them and runs nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from platform import machine, python_version, system
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from art_core import PluginRegistry
from art_runtime.environments import EngineSpec, environment_for, python_for

from .matrix_cells import Cell

_OWN: Final = "art-conformance"


def versions_of(cell: Cell, registry: PluginRegistry) -> dict[str, str]:
    """What a reader is told: the machine, the cell's distributions, those that they require, and what the engines' own
    environments hold.

    Raises EnvironmentMissing, with the command that makes it, when an engine has no environment to run in.
    """
    found = {"machine": f"{system()} {machine()}, {os.cpu_count()} cores", "python": python_version()}
    ours = distributions_of(cell, registry)
    found |= {name: metadata.version(name) for name in ours}
    required = {name for each in ours for name in _required(each) if _installed(name)} - set(ours)
    found |= {name: metadata.version(name) for name in sorted(required)}
    for card in _cards(cell, registry):
        python_for(card)
        if card.environment is not None:
            facts: dict[str, Any] = environment_for(card).facts()
            found |= {f"{card.name}: {name}": version for name, version in facts.get("versions", {}).items()}
    return found


def sources_of(cell: Cell, registry: PluginRegistry) -> str:
    """A hash of every file that the cell's distributions are made of, as they lie on disk now, of its test file and
    the modules beside it, and of what its engines' environments were made of.
    """
    whole = hashlib.sha256()
    for name in distributions_of(cell, registry):
        whole.update(f"{name}\n".encode())
        _add(whole, _files_of(metadata.distribution(name)))
    if cell.tests:
        _add(whole, _modules_in(Path(cell.tests).resolve().parent))
    for card in _cards(cell, registry):
        if card.environment is not None:
            whole.update(environment_for(card).folder.name.encode())
    return whole.hexdigest()


def distributions_of(cell: Cell, registry: PluginRegistry) -> list[str]:
    """The distributions whose code a cell runs, by name: the suite's, those of its plugins, and of ART and of plugins
    whatever these require. A cell that says of no plugin that it is about it is about all of them.
    """
    of_plugins = {canonicalize_name(info.distribution) for info in registry.infos if info.distribution}
    ours = of_plugins | {name for name in _all_installed() if name.startswith("art-")}
    about = set(cell.plugins)
    waiting: list[str] = [
        canonicalize_name(info.distribution)
        for info in registry.infos
        if info.distribution and (not about or info.name in about or about & set(info.provides))
    ]
    found = set[str]()
    waiting.append(_OWN)
    while waiting:
        name = waiting.pop()
        if name not in found and _installed(name):
            found.add(name)
            waiting += [required for required in _required(name) if required in ours]
    return sorted(found)


def _cards(cell: Cell, registry: PluginRegistry) -> Iterator[EngineSpec]:
    if cell.inference_engine:
        yield registry.inference_engine(cell.inference_engine)
    if cell.training_engine:
        yield registry.training_engine(cell.training_engine)


def _required(name: str) -> Sequence[str]:
    """What a distribution requires itself, extras included."""
    return [canonicalize_name(Requirement(line).name) for line in metadata.distribution(name).requires or ()]


def _all_installed() -> set[str]:
    return {canonicalize_name(each.name) for each in metadata.distributions()}


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _files_of(distribution: metadata.Distribution) -> Iterator[tuple[str, Path]]:
    project = _editable(distribution)
    if project is None:
        for file in distribution.files or ():
            yield file.as_posix(), Path(str(distribution.locate_file(file)))
        return
    yield "pyproject.toml", project / "pyproject.toml"
    # The packages, wherever they lie in the project; the rest of it doesn't come with an installation.
    for root in (project, project / "src"):
        for package in sorted(root.glob("*/__init__.py")):
            yield from _below(package.parent)
        yield from _modules_in(root)


def _editable(distribution: metadata.Distribution) -> Path | None:
    """The project's folder when it was installed with `pip install -e`."""
    for file in distribution.files or ():
        if file.name == "direct_url.json":
            said = json.loads(Path(str(file.locate())).read_bytes())
            return Path(unquote(urlsplit(said["url"]).path)) if said.get("dir_info", {}).get("editable") else None
    return None


def _modules_in(folder: Path) -> Iterator[tuple[str, Path]]:
    yield from ((file.name, file) for file in sorted(folder.glob("*.py")))


def _below(folder: Path) -> Iterator[tuple[str, Path]]:
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(folders)
        for name in sorted(files):
            file = Path(path, name)
            yield file.relative_to(folder.parent).as_posix(), file


def _add(whole: Any, files: Iterable[tuple[str, Path]]) -> None:
    for name, file in files:
        # Compiled anew by whoever imports it.
        if file.suffix != ".pyc" and file.is_file():
            whole.update(f"{name}\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
