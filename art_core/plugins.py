"""Finds plugins, holds each against its version gates, and gives what they provide by name.

Every entry point is loaded on its own, so one broken plugin costs only itself: it is warned of once, and asking for it
by name raises with its reason. Reads the environment only when a registry loads. Knows no plugin by name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pluggy

from . import hookspecs
from .backend import BackendSpec
from .engines import InferenceEngineSpec, PluginSpec, TrainingEngineSpec
from .errors import MisspeltHook, PluginError, PluginNotInstalled, did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

# importlib.metadata and packaging are imported where they are used: together they are a fifth of `import art_core`.
ENTRY_POINT_GROUP = "art"
API_VERSION = 1
OLDEST_API_VERSION = 1

Kind = Literal["backend", "inference engine", "training engine"]
SpecT = TypeVar("SpecT", bound=PluginSpec)
_REGISTRATION: dict[str, tuple[Kind, type[PluginSpec]]] = {
    "art_register_backends": ("backend", BackendSpec),
    "art_register_inference_engines": ("inference engine", InferenceEngineSpec),
    "art_register_training_engines": ("training engine", TrainingEngineSpec),
}
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
    plugin: object
    specs: tuple[tuple[Kind, PluginSpec], ...]


class PluginRegistry:
    """The plugins of one process and what they provide.

    `load()` reads entry points and the variables ART_DISABLE_PLUGINS, ART_LOAD_PLUGINS (comma-separated names) and
    ART_TRACE_PLUGINS. `register` adds a plugin object by hand, as tests and notebooks do.
    """

    def __init__(self) -> None:
        self.hooks = pluggy.PluginManager(hookspecs.PROJECT)
        self.hooks.add_hookspecs(hookspecs)
        self._infos: dict[tuple[str, str], PluginInfo] = {}
        self._specs: dict[tuple[Kind, str], tuple[PluginSpec, PluginInfo]] = {}
        self._disputed: dict[tuple[Kind, str], str] = {}

    @property
    def infos(self) -> list[PluginInfo]:
        """Every plugin that was found, whatever became of it, by name."""
        return sorted(self._infos.values(), key=lambda info: (info.name, info.distribution))

    def load(self, entry_points: Iterable[EntryPoint] | None = None) -> None:
        """Load every installed plugin, or the given entry points. Warns once for each that can't be used."""
        disabled, only = _names("ART_DISABLE_PLUGINS"), _names("ART_LOAD_PLUGINS")
        if os.environ.get("ART_TRACE_PLUGINS"):
            self._trace()
        from importlib import metadata

        found_points = list(metadata.entry_points(group=ENTRY_POINT_GROUP) if entry_points is None else entry_points)
        # An editable install next to a wheel shows the same distribution twice; that is one plugin.
        points = {(p.name, _distribution(p)[0], p.value): p for p in found_points}.values()
        by_name: dict[str, list[EntryPoint]] = {}
        for point in points:
            by_name.setdefault(point.name, []).append(point)
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
        """Add a plugin object or module by hand. Raises PluginError saying why when it can't be used."""
        info = PluginInfo(name=name, distribution="(registered by hand)", version="", status=PluginStatus.ACTIVE)
        self._load_one(info, lambda: plugin, (), warn=False)
        problem = self._infos[name, info.distribution]
        if problem.status is not PluginStatus.ACTIVE:
            raise PluginError(f"the plugin {name!r} is {problem.status.value}: {problem.error}")

    def unregister(self, name: str) -> None:
        """Take back a plugin that was registered by hand."""
        self.hooks.unregister(name=name)
        self._infos = {key: info for key, info in self._infos.items() if key[0] != name}
        self._specs = {key: entry for key, entry in self._specs.items() if entry[1].name != name}

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
        if (kind, name) in self._disputed:
            raise PluginError(self._disputed[kind, name])
        if (kind, name) in self._specs:
            spec = self._specs[kind, name][0]
            assert isinstance(spec, expected)
            return spec
        for info in self._infos.values():
            if info.name == name and info.status is not PluginStatus.ACTIVE:
                raise PluginError(
                    f"the {kind} {name!r} cannot be used: its plugin ({info.distribution} {info.version}) is"
                    f" {info.status.value}: {info.error}"
                )
        there = self.provided(kind)
        line = _PIP_LINES.get((kind, name))
        to_install = f"pip install {line}" if line else _TO_INSTALL[kind]
        raise PluginNotInstalled(
            f"no {kind} is called {name!r}.{did_you_mean(name, there) if not line else ''}"
            f" Installed: {', '.join(there) or 'none'}. To install one: {to_install}"
        )

    def _load_one(
        self, info: PluginInfo, load: Callable[[], object], requirements: tuple[str, ...], *, warn: bool = True
    ) -> None:
        refused = next(filter(None, map(_refused_range, requirements)), "")
        if refused:
            self._note(replace(info, status=PluginStatus.INCOMPATIBLE, error=refused), warn=warn)
            return
        try:
            plugin = load()
        except Exception as error:
            reason = f"it could not be imported: {type(error).__name__}: {error}"
            self._note(replace(info, status=PluginStatus.BROKEN, error=reason), warn=warn)
            return
        api = getattr(plugin, "art_api", None)
        if not isinstance(api, int):
            reason = f"it declares no art_api; write `art_api = {API_VERSION}` in it"
            self._note(replace(info, status=PluginStatus.BROKEN, error=reason), warn=warn)
            return
        info = replace(info, api=api)
        if not OLDEST_API_VERSION <= api <= API_VERSION:
            side = "upgrade art-core" if api > API_VERSION else f"upgrade {info.distribution}"
            reason = f"it speaks plugin API {api}, art-core speaks {OLDEST_API_VERSION} to {API_VERSION}; {side}"
            self._note(replace(info, status=PluginStatus.INCOMPATIBLE, error=reason), warn=warn)
            return
        try:
            found = self._examine(info, plugin)
        except Exception as error:
            reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
            if self.hooks.has_plugin(info.name):
                self.hooks.unregister(name=info.name)
            self._note(replace(info, status=PluginStatus.BROKEN, error=reason), warn=warn)
            return
        self._adopt(found, warn=warn)

    def _examine(self, info: PluginInfo, plugin: object) -> _Found:
        hooks = _implemented_hooks(self.hooks, plugin)
        self.hooks.register(plugin, name=info.name)
        specs: list[tuple[Kind, PluginSpec]] = []
        for hook, (kind, expected) in _REGISTRATION.items():
            if hook not in hooks:
                continue
            for spec in getattr(plugin, hook)():
                if not isinstance(spec, expected):
                    raise PluginError(f"{hook} must give {expected.__name__} objects, not {type(spec).__name__}")
                specs.append((kind, spec))
        described = replace(
            info,
            hooks=tuple(hooks),
            provides=tuple(f"{kind} {spec.name}" for kind, spec in specs),
            capabilities={
                f"{kind} {spec.name}": tuple(sorted(str(c.value) for c in getattr(spec, "capabilities", ())))
                for kind, spec in specs
            },
        )
        return _Found(described, plugin, tuple(specs))

    def _adopt(self, found: _Found, *, warn: bool) -> None:
        for kind, spec in found.specs:
            rival = self._specs.get((kind, spec.name))
            if rival is not None:
                other = rival[1]
                error = (
                    f"the {kind} {spec.name!r} is provided by {other.distribution} (plugin {other.name!r}) and by"
                    f" {found.info.distribution} (plugin {found.info.name!r}); uninstall one of them"
                )
                self._disputed[kind, spec.name] = error
                for info in (other, found.info):
                    self._note(replace(info, status=PluginStatus.DUPLICATE, error=error), warn=warn)
                    if self.hooks.has_plugin(info.name):
                        self.hooks.unregister(name=info.name)
                names = {other.name, found.info.name}
                self._specs = {key: entry for key, entry in self._specs.items() if entry[1].name not in names}
                return
        for kind, spec in found.specs:
            self._specs[kind, spec.name] = (spec, found.info)
        self._note(found.info)

    def _note(self, info: PluginInfo, *, warn: bool = False) -> None:
        self._infos[info.name, info.distribution] = info
        if warn:
            warnings.warn(
                f"plugin {info.name!r} of {info.distribution} is {info.status.value} and left out: {info.error}",
                RuntimeWarning,
                stacklevel=4,
            )

    def _trace(self) -> None:
        def before(hook: str, impls: Any, kwargs: Mapping[str, Any]) -> None:
            print(f"art: {hook}({', '.join(kwargs)}) → {[impl.plugin_name for impl in impls]}", file=sys.stderr)

        def after(outcome: Any, hook: str, impls: Any, kwargs: Mapping[str, Any]) -> None:
            return None

        self.hooks.add_hookcall_monitoring(before, after)


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
    except (ImportError, AttributeError) as error:
        raise PluginError(
            f"{spec.name!r} is registered as {spec.factory}, which cannot be imported: {error}"
        ) from error
    return factory


def _names(variable: str) -> frozenset[str]:
    return frozenset(filter(None, (part.strip() for part in os.environ.get(variable, "").split(","))))


def _distribution(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("(unknown)", "")


def _requirements(point: EntryPoint) -> tuple[str, ...]:
    return tuple(point.dist.requires or ()) if point.dist else ()


def _refused_range(line: str) -> str:
    """Why the installed art-core is outside a plugin's pip range, or an empty string."""
    from importlib import metadata

    from packaging.requirements import InvalidRequirement, Requirement

    try:
        requirement = Requirement(line)
    except InvalidRequirement:
        return ""
    if requirement.name.lower().replace("_", "-") != "art-core":
        return ""
    try:
        version = metadata.version("art-core")
    except metadata.PackageNotFoundError:
        return ""
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"it needs art-core {requirement.specifier}, installed is {version}; upgrade the one or the other"


def _implemented_hooks(hooks: pluggy.PluginManager, plugin: object) -> list[str]:
    """The hooks that a plugin implements. Raises MisspeltHook for one that doesn't exist or has lost its decorator."""
    known = {name for name in vars(hookspecs) if name.startswith("art_")}
    implemented = []
    for name in dir(plugin):
        if not name.startswith("art_") or not callable(getattr(plugin, name, None)):
            continue
        options = hooks.parse_hookimpl_opts(plugin, name)
        if name not in known:
            if options is not None or _defined_in(plugin, name):
                raise MisspeltHook(f"it implements {name}, which is not a hook.{did_you_mean(name, known)}")
            continue
        if options is None:
            raise MisspeltHook(f"its {name} is not decorated with @hookimpl, so it would never be called")
        if options.get("wrapper") or options.get("hookwrapper"):
            raise MisspeltHook(f"its {name} is a wrapper; the hooks of ART are called one by one and can't be wrapped")
        implemented.append(name)
    return implemented


def _defined_in(plugin: object, name: str) -> bool:
    return inspect.isfunction(function := getattr(plugin, name)) and (
        not isinstance(plugin, ModuleType) or function.__module__ == plugin.__name__
    )
