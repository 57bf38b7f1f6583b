"""Writes the first version of a plugin: a whole distribution that installs, passes `art plugins check` and its suite.

Knows the templates beside it, each a working plugin named `example`, and the names that a new one may have. What a
plugin does it doesn't know.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

from art_core import PluginRegistry
from art_core.errors import InvalidName

# In a file's name "dot-" stands for ".": packagers leave out what is hidden.
_HIDDEN: Final = "dot-"
_NAME: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_PLACEHOLDER: Final = re.compile(
    r"(?P<dist>art-(?:backend|engine|tracker)-example)|(?P<module>art_\w+?_example)|(?P<other>[Ee]xample)"
)


class PluginKind(StrEnum):
    """What a plugin can be; the kit has a template for each."""

    INFERENCE_ENGINE = "inference-engine"
    TRAINING_ENGINE = "training-engine"
    BACKEND = "backend"
    TRACKER = "tracker"

    @property
    def prefix(self) -> str:
        """What the names of such distributions begin with."""
        return f"art-{self.value.rpartition('-')[2]}-"


@dataclass(frozen=True)
class NewPlugin:
    """A plugin that isn't there yet. `name` is how users ask for it, such as `LocalBackend(inference_engine=name)`."""

    name: str
    kind: PluginKind

    @property
    def distribution(self) -> str:
        """What pip installs."""
        return self.kind.prefix + self.name

    @property
    def module(self) -> str:
        """What Python imports."""
        return self.distribution.replace("-", "_")

    @property
    def class_prefix(self) -> str:
        """What its classes' names begin with."""
        return "".join(word.capitalize() for word in self.name.split("-"))


def plan_plugin(name: str, kind: PluginKind, registry: PluginRegistry) -> NewPlugin:
    """The plugin of that name, which may be given with or without its distribution's prefix.

    Raises InvalidName for one that pip, Python or an installed plugin doesn't leave free.
    """
    short = name.removeprefix(kind.prefix)
    if not _NAME.fullmatch(short):
        raise InvalidName(
            f"A plugin can't be called {name!r}: use small letters, digits and single hyphens, beginning with a letter,"
            f" such as 'fast-server', which makes the distribution {kind.prefix}fast-server."
        )
    for info in registry.infos:
        if short == info.name or short in {provided.rpartition(" ")[2] for provided in info.provides}:
            raise InvalidName(
                f"The name {short!r} is taken by {info.distribution} {info.version}, which is installed here. Two"
                " plugins of one name are both left out, so choose another."
            )
    return NewPlugin(short, kind)


def write_plugin(plugin: NewPlugin, folder: Path) -> list[Path]:
    """Write the project into `folder`, whole or not at all; gives its files, relative to it.

    Raises FileExistsError when something is there already, and NotADirectoryError when it lies below a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already and isn't empty. Give another place with --directory.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    written = []
    try:
        for place, text in _project(plugin):
            (unfinished / place).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / place).write_text(text, encoding="utf-8")
            written.append(place)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return sorted(written)


def _project(plugin: NewPlugin) -> Iterator[tuple[Path, str]]:
    for template in ("any-kind", plugin.kind.value):
        with as_file(files("art") / "plugin_templates" / template) as root:
            for file in sorted(root.rglob("*")):
                if file.is_file() and "__pycache__" not in file.parts:
                    parts = [re.sub(f"^{_HIDDEN}", ".", part) for part in file.relative_to(root).parts]
                    yield Path(_renamed("/".join(parts), plugin)), _renamed(file.read_text(encoding="utf-8"), plugin)


def _renamed(text: str, plugin: NewPlugin) -> str:
    def name(match: re.Match[str]) -> str:
        if match["dist"]:
            return plugin.distribution
        if match["module"]:
            return plugin.module
        return plugin.class_prefix if match["other"][0] == "E" else plugin.name

    return _PLACEHOLDER.sub(name, text)
