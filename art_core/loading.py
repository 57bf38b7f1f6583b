"""From entry points to records: which plugins there are, and of each what it gives or what is wrong with it.

Every entry point is loaded on its own, so one broken plugin costs only itself. Reads the environment only when asked
for entry points. Knows one plugin at a time; how they get on with each other is the registry's.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

import pluggy

from .engines import PluginSpec
from .errors import PluginError, did_you_mean
from .plugin_gates import API_VERSION, implemented_hooks, refused_api, refused_range, registered_cards

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "art"


class PluginStatus(Enum):
    """What became of a plugin."""

    ACTIVE = "active"  #: loaded, and everything it provides can be used
    BROKEN = "broken"  #: it could not be imported, or is not a plugin
    INCOMPATIBLE = "incompatible"  #: made for another version of art-core
    DISABLED = "disabled"  #: left out by ART_DISABLE_PLUGINS or ART_LOAD_PLUGINS
    DUPLICATE = "duplicate"  #: two distributions provide the same name, so neither is used


@dataclass(frozen=True, kw_only=True)
class PluginInfo:
    """One row of `art plugins`. `provides` reads like "inference engine torch"; `error` is empty for an active
    plugin.
    """

    name: str
    distribution: str
    version: str
    status: PluginStatus
    api: int | None = None
    provides: tuple[str, ...] = ()
    capabilities: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hooks: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class LoadedPlugin:
    """A plugin that was imported and passed its gates, and the cards it registered, each with its kind."""

    info: PluginInfo
    cards: tuple[tuple[str, PluginSpec], ...]


@dataclass(frozen=True)
class FoundPlugin:
    """An entry point before it is loaded. `info` says ACTIVE unless it is left out, or its name taken twice."""

    info: PluginInfo
    load: Callable[[], object]
    requirements: tuple[str, ...]


def find_plugins(entry_points: Iterable[EntryPoint] | None = None) -> list[FoundPlugin]:
    """Every installed entry point, or the given ones, by name; ART_DISABLE_PLUGINS and ART_LOAD_PLUGINS leave out.

    Warns of a name in them that is no plugin.
    """
    from importlib import metadata  # a tenth of `import art_core`, which doesn't need it

    found = list(metadata.entry_points(group=ENTRY_POINT_GROUP) if entry_points is None else entry_points)
    # An editable install next to a wheel shows the same distribution twice; that is one plugin.
    points = {(p.name, _distribution(p)[0], p.value): p for p in found}.values()
    by_name: dict[str, list[EntryPoint]] = {}
    for point in points:
        by_name.setdefault(point.name, []).append(point)
    disabled, only = _names("ART_DISABLE_PLUGINS"), _names("ART_LOAD_PLUGINS")
    for variable, names in (("ART_DISABLE_PLUGINS", disabled), ("ART_LOAD_PLUGINS", only)):
        for unknown in sorted(names - by_name.keys()):
            near = did_you_mean(unknown, by_name)
            warnings.warn(f"{variable} names {unknown!r}, which is no plugin here.{near}", RuntimeWarning, stacklevel=3)
    plugins = []
    for name, same in sorted(by_name.items()):
        status, error = PluginStatus.ACTIVE, ""
        if name in disabled or (only and name not in only):
            variable = "ART_DISABLE_PLUGINS" if name in disabled else "ART_LOAD_PLUGINS"
            status, error = PluginStatus.DISABLED, f"left out by {variable}"
        elif len(same) > 1:
            others = " and ".join(sorted(_distribution(p)[0] for p in same))
            status = PluginStatus.DUPLICATE
            error = f"the plugin name {name!r} is taken by {others}; uninstall one of them"
        for point in same:
            distribution, version = _distribution(point)
            info = PluginInfo(name=name, distribution=distribution, version=version, status=status, error=error)
            requirements = tuple(point.dist.requires or ()) if point.dist else ()
            plugins.append(FoundPlugin(info, point.load, requirements))
    return plugins


def load_plugin(hooks: pluggy.PluginManager, found: FoundPlugin) -> LoadedPlugin | PluginInfo:
    """What a plugin provides, or what is wrong with it; in the latter case none of its hooks stay registered."""
    info = found.info
    if refused := next(filter(None, map(refused_range, found.requirements)), ""):
        return replace(info, status=PluginStatus.INCOMPATIBLE, error=refused)
    try:
        plugin = found.load()
    except (Exception, SystemExit) as error:
        reason = f"it could not be imported: {type(error).__name__}: {error}"
        return replace(info, status=PluginStatus.BROKEN, error=reason)
    api = getattr(plugin, "art_api", None)
    if not isinstance(api, int):
        reason = f"it declares no art_api; write `art_api = {API_VERSION}` in it"
        return replace(info, status=PluginStatus.BROKEN, error=reason)
    info = replace(info, api=api)
    if refused := refused_api(api, info.distribution):
        return replace(info, status=PluginStatus.INCOMPATIBLE, error=refused)
    try:
        implemented = implemented_hooks(hooks, plugin)
        hooks.register(plugin, name=info.name)
        cards = registered_cards(hooks, plugin)
    except (Exception, SystemExit) as error:
        reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        if hooks.get_plugin(info.name) is plugin:
            hooks.unregister(name=info.name)
        return replace(info, status=PluginStatus.BROKEN, error=reason)
    declared = {f"{kind} {card.name}": getattr(card, "capabilities", ()) for kind, card in cards}
    capabilities = {name: tuple(sorted(map(str, members))) for name, members in declared.items()}
    info = replace(info, hooks=tuple(implemented), provides=tuple(capabilities), capabilities=capabilities)
    return LoadedPlugin(info, tuple(cards))


def _names(variable: str) -> frozenset[str]:
    return frozenset(filter(None, (part.strip() for part in os.environ.get(variable, "").split(","))))


def _distribution(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("(unknown)", "")
