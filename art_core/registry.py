"""The plugins of one process: what they provide, by name, and what became of those that provide nothing.

A plugin that can't be used is warned of once, and asking for it by name raises with its reason. What a plugin is held
against is `loading`'s and `plugin_gates`'.
"""

from __future__ import annotations

import functools
import os
import pkgutil
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pluggy

from . import hookspecs
from .backend import BackendSpec
from .engines import InferenceEngineSpec, PluginSpec, TrainingEngineSpec
from .errors import PluginError, PluginNotInstalled, did_you_mean
from .loading import FoundPlugin, LoadedPlugin, PluginInfo, PluginStatus, find_plugins, load_plugin

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Kind = Literal["backend", "inference engine", "training engine"]
SpecT = TypeVar("SpecT", bound=PluginSpec)
# The plugins of this project, each in a distribution of its name; they may not be installed, and nothing imports them.
_OURS: dict[Kind, tuple[str, ...]] = {
    "backend": ("local", "serverless"),
    "inference engine": ("torch", "vllm", "sglang"),
    "training engine": ("torch", "unsloth", "torchtune"),
}
_TO_BEGIN_WITH: dict[Kind, str] = {
    "backend": "pip install art-backend-local",
    "inference engine": "pip install art-engine-vllm (CUDA) or pip install art-engine-torch",
    "training engine": "pip install art-engine-unsloth (CUDA) or pip install art-engine-torch",
}


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
        if os.environ.get("ART_TRACE_PLUGINS"):
            self._start_tracing()
        for found in find_plugins(entry_points):
            if found.info.status is not PluginStatus.ACTIVE:
                self._note(found.info, warn=found.info.status is PluginStatus.DUPLICATE)
                continue
            loaded = load_plugin(self.hooks, found)
            if isinstance(loaded, PluginInfo):
                self._note(loaded, warn=True)
            else:
                self._adopt(loaded, warn=True)

    def register(self, plugin: object, name: str) -> None:
        """Add a plugin object or module by hand. Raises PluginError saying why when it can't be used; nothing changes
        then.
        """
        for info in self._infos.values():
            if info.name == name and info.status is PluginStatus.ACTIVE:
                raise PluginError(f"there is a plugin {name!r} already, of {info.distribution}; unregister it first")
        info = PluginInfo(name=name, distribution="(registered by hand)", version="", status=PluginStatus.ACTIVE)
        loaded = load_plugin(self.hooks, FoundPlugin(info, lambda: plugin, ()))
        if isinstance(loaded, PluginInfo):
            raise PluginError(f"the plugin {name!r} is {loaded.status.value}: {loaded.error}")
        for kind, card in loaded.cards:
            for rival in self._providers(kind, card.name):
                self.hooks.unregister(name=name)
                raise PluginError(
                    f"the {kind} {card.name!r} of {name!r} is there already, from {rival.distribution}"
                    f" (plugin {rival.name!r}); unregister that one first"
                )
        self._adopt(loaded, warn=False)

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

    @staticmethod
    def to_install(kind: Kind, name: str = "") -> str:
        """The pip line for a plugin of this kind: of that name where it is one of ours, else of one to begin with."""
        return f"pip install art-{kind.rpartition(' ')[2]}-{name}" if name in _OURS[kind] else _TO_BEGIN_WITH[kind]

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
        near = "" if name in _OURS[kind] else did_you_mean(name, there)
        left_out = ", ".join(sorted({info.name for info in unusable}))
        raise PluginNotInstalled(
            f"no {kind} is called {name!r}.{near} Installed: {', '.join(there) or 'none'}. To install one:"
            f" {self.to_install(kind, name)}."
            + (f" Left out: {left_out}; `art plugins check` says why." if left_out else "")
        )

    def _providers(self, kind: str, name: str) -> list[PluginInfo]:
        if (kind, name) in self._specs:
            return [self._specs[kind, name][1]]
        return self._disputed.get((kind, name), [])

    def _adopt(self, loaded: LoadedPlugin, *, warn: bool) -> None:
        for kind, card in loaded.cards:
            if rivals := self._providers(kind, card.name):
                self._dispute(kind, card.name, [*rivals, loaded.info], warn=warn)
                return
        for kind, card in loaded.cards:
            self._specs[kind, card.name] = (card, loaded.info)
        self._note(loaded.info)

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

        if not self._tracing:
            self.hooks.add_hookcall_monitoring(before, lambda *_: None)
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
    try:
        return pkgutil.resolve_name(spec.factory)
    except Exception as error:
        raise PluginError(
            f"{spec.name!r} is registered as {spec.factory}, which cannot be imported: {type(error).__name__}: {error}"
        ) from error
