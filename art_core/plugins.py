"""Finds plugins, holds each against its version gates, and gives what they provide by name.

Every entry point is loaded on its own, so one broken plugin costs only itself: it is warned of once, and asking for it
by name raises with its reason. Reads the environment only when a registry loads. Knows no plugin by name.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pluggy

from . import hookspecs
from .backend import BackendSpec
from .engines import InferenceEngineSpec, PluginSpec, TrainingEngineSpec
from .errors import PluginError, PluginNotInstalled, did_you_mean
from .plugin_gates import API_VERSION, implemented_hooks, refused_api, refused_range, registered_cards

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "art"
Kind = Literal["backend", "inference engine", "training engine"]
SpecT = TypeVar("SpecT", bound=PluginSpec)
# The pip line for plugins of this project that may not be installed. Text only: nothing here imports them.
_PIP_LINES: dict[tuple[Kind, str], str] = {
    ("backend", "local"): "art-backend-local",
    ("backend", "serverless"): "art-backend-serverless",
    ("inference engine", "torch"): "art-engine-torch",
    ("inference engine", "vllm"): "art-engine-vllm",
    ("inference engine", "sglang"): "art-engine-sglang",
    ("training engine", "torch"): "art-engine-torch",
    ("training engine", "unsloth"): "art-engine-unsloth",
    ("training engine", "torchtune"): "art-engine-torchtune",
}
_TO_INSTALL: dict[Kind, str] = {
    "backend": "pip install art-backend-local",
    "inference engine": "pip install art-engine-vllm (CUDA) or pip install art-engine-torch",
    "training engine": "pip install art-engine-unsloth (CUDA) or pip install art-engine-torch",
}


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

    def as_json(self) -> dict[str, Any]:
        """The object that `art plugins --json` prints."""
        return {
            "name": self.name,
            "distribution": self.distribution,
            "version": self.version,
            "api": self.api,
            "status": self.status.value,
            "provides": list(self.provides),
            "capabilities": {name: list(values) for name, values in self.capabilities.items()},
            "hooks": list(self.hooks),
            "error": self.error,
        }


@dataclass(frozen=True)
class _Found:
    """A plugin that was imported and passed its gates, and the cards it registered."""

    info: PluginInfo
    cards: tuple[tuple[str, PluginSpec], ...]


class PluginRegistry:
    """The plugins of one process and what they provide.

    `load()` reads entry points and the variables ART_DISABLE_PLUGINS, ART_LOAD_PLUGINS (comma-separated names) and
    ART_TRACE_PLUGINS. `register` adds a plugin object by hand, as tests and notebooks do.
    """

    def __init__(self) -> None:
        self.hooks = pluggy.PluginManager(hookspecs.PROJECT)
        self.hooks.add_hookspecs(hookspecs)
        self._infos: dict[tuple[str, str], PluginInfo] = {}
        self._specs: dict[tuple[str, str], tuple[PluginSpec, PluginInfo]] = {}
        self._disputed: dict[tuple[str, str], list[PluginInfo]] = {}
        self._tracing = False

    @property
    def infos(self) -> list[PluginInfo]:
        """Every plugin that was found, whatever became of it, by name."""
        return sorted(self._infos.values(), key=lambda info: (info.name, info.distribution))

    def load(self, entry_points: Iterable[EntryPoint] | None = None) -> None:
        """Load every installed plugin, or the given entry points. Warns once for each that can't be used."""
        disabled, only = _names("ART_DISABLE_PLUGINS"), _names("ART_LOAD_PLUGINS")
        if os.environ.get("ART_TRACE_PLUGINS"):
            self._start_tracing()
        from importlib import metadata  # a tenth of `import art_core`, which doesn't need it

        found_points = list(metadata.entry_points(group=ENTRY_POINT_GROUP) if entry_points is None else entry_points)
        # An editable install next to a wheel shows the same distribution twice; that is one plugin.
        points = {(p.name, _distribution(p)[0], p.value): p for p in found_points}.values()
        by_name: dict[str, list[EntryPoint]] = {}
        for point in points:
            by_name.setdefault(point.name, []).append(point)
        for variable, names in (("ART_DISABLE_PLUGINS", disabled), ("ART_LOAD_PLUGINS", only)):
            for unknown in sorted(names - by_name.keys()):
                near = did_you_mean(unknown, by_name)
                warnings.warn(
                    f"{variable} names {unknown!r}, which is no plugin here.{near}", RuntimeWarning, stacklevel=2
                )
        for name, same in sorted(by_name.items()):
            for point in same:
                distribution, version = _distribution(point)
                info = PluginInfo(name=name, distribution=distribution, version=version, status=PluginStatus.ACTIVE)
                if name in disabled or (only and name not in only):
                    variable = "ART_DISABLE_PLUGINS" if name in disabled else "ART_LOAD_PLUGINS"
                    self._note(replace(info, status=PluginStatus.DISABLED, error=f"left out by {variable}"))
                elif len(same) > 1:
                    others = " and ".join(sorted(_distribution(p)[0] for p in same))
                    error = f"the plugin name {name!r} is taken by {others}; uninstall one of them"
                    self._note(replace(info, status=PluginStatus.DUPLICATE, error=error), warn=True)
                else:
                    self._load_one(info, point.load, _requirements(point))

    def register(self, plugin: object, name: str) -> None:
        """Add a plugin object or module by hand. Raises PluginError saying why when it can't be used; nothing changes
        then.
        """
        for info in self._infos.values():
            if info.name == name and info.status is PluginStatus.ACTIVE:
                raise PluginError(f"there is a plugin {name!r} already, of {info.distribution}; unregister it first")
        info = PluginInfo(name=name, distribution="(registered by hand)", version="", status=PluginStatus.ACTIVE)
        found = self._examine(info, lambda: plugin)
        if isinstance(found, PluginInfo):
            raise PluginError(f"the plugin {name!r} is {found.status.value}: {found.error}")
        for kind, card in found.cards:
            for rival in self._providers(kind, card.name):
                self.hooks.unregister(name=name)
                raise PluginError(
                    f"the {kind} {card.name!r} of {name!r} is there already, from {rival.distribution}"
                    f" (plugin {rival.name!r}); unregister that one first"
                )
        self._adopt(found, warn=False)

    def unregister(self, name: str) -> None:
        """Take a plugin out of this registry, with all that it provides. Raises PluginError when it isn't in use."""
        if not self.hooks.has_plugin(name):
            raise PluginError(f"no plugin {name!r} is in use here.{did_you_mean(name, (i.name for i in self.infos))}")
        self._withdraw(name)
        self._infos = {key: info for key, info in self._infos.items() if key[0] != name}

    def give_up(self, name: str, reason: str) -> None:
        """Count an active plugin as broken from now on, because it failed at what it must be able to do."""
        self._withdraw(name)
        for info in [info for info in self._infos.values() if info.name == name]:
            self._note(replace(info, status=PluginStatus.BROKEN, error=reason))

    def trace(self, hook: str, arguments: Iterable[str], plugins: Iterable[str]) -> None:
        """Say on stderr that a hook is called, when ART_TRACE_PLUGINS is set."""
        if self._tracing:
            print(f"art: {hook}({', '.join(arguments)}) → {', '.join(plugins) or 'nobody'}", file=sys.stderr)

    def backend(self, name: str) -> BackendSpec:
        """The card of a backend. Raises PluginNotInstalled with its pip line, or PluginError with what is wrong."""
        return self._spec("backend", name, BackendSpec)

    def inference_engine(self, name: str) -> InferenceEngineSpec:
        """The card of an inference engine; raises as `backend` does."""
        return self._spec("inference engine", name, InferenceEngineSpec)

    def training_engine(self, name: str) -> TrainingEngineSpec:
        """The card of a training engine; raises as `backend` does."""
        return self._spec("training engine", name, TrainingEngineSpec)

    def provided(self, kind: Kind) -> list[str]:
        """The names of a kind that can be used, sorted."""
        return sorted(name for k, name in self._specs if k == kind)

    def _spec(self, kind: Kind, name: str, expected: type[SpecT]) -> SpecT:
        if (kind, name) in self._specs:
            spec = self._specs[kind, name][0]
            assert isinstance(spec, expected)
            return spec
        unusable = [info for info in self._infos.values() if info.status is not PluginStatus.ACTIVE]
        for info in unusable:
            if info.name == name or f"{kind} {name}" in info.provides:
                raise PluginError(
                    f"the {kind} {name!r} cannot be used: its plugin {info.name!r} ({info.distribution} {info.version})"
                    f" is {info.status.value}: {info.error}"
                )
        there = self.provided(kind)
        line = _PIP_LINES.get((kind, name))
        to_install = f"pip install {line}" if line else _TO_INSTALL[kind]
        left_out = ", ".join(sorted({info.name for info in unusable}))
        raise PluginNotInstalled(
            f"no {kind} is called {name!r}.{did_you_mean(name, there) if not line else ''}"
            f" Installed: {', '.join(there) or 'none'}. To install one: {to_install}."
            + (f" Left out: {left_out}; `art plugins check` says why." if left_out else "")
        )

    def _load_one(self, info: PluginInfo, load: Callable[[], object], requirements: tuple[str, ...]) -> None:
        refused = next(filter(None, map(refused_range, requirements)), "")
        if refused:
            self._note(replace(info, status=PluginStatus.INCOMPATIBLE, error=refused), warn=True)
            return
        found = self._examine(info, load)
        if isinstance(found, PluginInfo):
            self._note(found, warn=True)
        else:
            self._adopt(found, warn=True)

    def _examine(self, info: PluginInfo, load: Callable[[], object]) -> _Found | PluginInfo:
        """What a plugin provides, or what is wrong with it; in the latter case none of its hooks stay registered."""
        try:
            plugin = load()
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
            hooks = implemented_hooks(self.hooks, plugin)
            self.hooks.register(plugin, name=info.name)
            cards = registered_cards(self.hooks, plugin)
        except (Exception, SystemExit) as error:
            reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
            if self.hooks.get_plugin(info.name) is plugin:
                self.hooks.unregister(name=info.name)
            return replace(info, status=PluginStatus.BROKEN, error=reason)
        described = replace(
            info,
            hooks=tuple(hooks),
            provides=tuple(f"{kind} {card.name}" for kind, card in cards),
            capabilities={
                f"{kind} {card.name}": tuple(sorted(str(c.value) for c in getattr(card, "capabilities", ())))
                for kind, card in cards
            },
        )
        return _Found(described, tuple(cards))

    def _providers(self, kind: str, name: str) -> list[PluginInfo]:
        if (kind, name) in self._specs:
            return [self._specs[kind, name][1]]
        return self._disputed.get((kind, name), [])

    def _adopt(self, found: _Found, *, warn: bool) -> None:
        for kind, card in found.cards:
            rivals = self._providers(kind, card.name)
            if rivals:
                self._dispute(kind, card.name, [*rivals, found.info], warn=warn)
                return
        for kind, card in found.cards:
            self._specs[kind, card.name] = (card, found.info)
        self._note(found.info)

    def _dispute(self, kind: str, name: str, providers: list[PluginInfo], *, warn: bool) -> None:
        self._disputed[kind, name] = providers
        who = " and ".join(f"{info.distribution} (plugin {info.name!r})" for info in providers)
        error = f"the {kind} {name!r} is provided by {who}; uninstall all but one"
        for info in providers:
            known = self._infos.get((info.name, info.distribution))
            told = known is not None and known.status is PluginStatus.DUPLICATE
            self._note(replace(info, status=PluginStatus.DUPLICATE, error=error), warn=warn and not told)
            self._withdraw(info.name)

    def _withdraw(self, name: str) -> None:
        if self.hooks.has_plugin(name):
            self.hooks.unregister(name=name)
        self._specs = {key: entry for key, entry in self._specs.items() if entry[1].name != name}

    def _note(self, info: PluginInfo, *, warn: bool = False) -> None:
        self._infos[info.name, info.distribution] = info
        if self._tracing:
            what = info.error or ", ".join((*info.provides, *info.hooks)) or "nothing"
            print(f"art: plugin {info.name} ({info.distribution}): {info.status.value}: {what}", file=sys.stderr)
        if warn:
            warnings.warn(
                f"plugin {info.name!r} of {info.distribution} is {info.status.value} and left out: {info.error}",
                RuntimeWarning,
                stacklevel=4,
            )

    def _start_tracing(self) -> None:
        def before(hook: str, impls: Any, kwargs: Mapping[str, Any]) -> None:
            self.trace(hook, kwargs, [impl.plugin_name for impl in reversed(impls)])

        def after(outcome: Any, hook: str, impls: Any, kwargs: Mapping[str, Any]) -> None:
            return None

        if not self._tracing:
            self.hooks.add_hookcall_monitoring(before, after)
        self._tracing = True


@functools.cache
def installed_plugins() -> PluginRegistry:
    """The registry of this process, loaded at the first call."""
    registry = PluginRegistry()
    registry.load()
    return registry


def instantiate(spec: PluginSpec, **arguments: Any) -> Any:
    """Import a card's factory and call it. Raises PluginError naming the plugin when that fails to import."""
    return load_factory(spec)(**arguments)


def load_factory(spec: PluginSpec) -> Any:
    """Import a card's factory without calling it. Raises PluginError naming the plugin when that fails."""
    module_name, _, attribute = spec.factory.partition(":")
    factory: Any
    try:
        factory = importlib.import_module(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except Exception as error:
        raise PluginError(
            f"{spec.name!r} is registered as {spec.factory}, which cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return factory


def _names(variable: str) -> frozenset[str]:
    return frozenset(filter(None, (part.strip() for part in os.environ.get(variable, "").split(","))))


def _distribution(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("(unknown)", "")


def _requirements(point: EntryPoint) -> tuple[str, ...]:
    return tuple(point.dist.requires or ()) if point.dist else ()
