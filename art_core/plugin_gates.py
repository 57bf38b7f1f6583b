"""What a plugin is held against before it may take part: its pip range, its plugin API, the hooks it writes, the cards
it gives.

Knows one plugin at a time. What becomes of it, and how plugins get on with each other, is the registry's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from types import ModuleType

import pluggy

from . import hookspecs
from .backend import BackendSpec
from .capabilities import BackendCapability, Capability, InferenceCapability, TrainingCapability
from .engines import InferenceEngineSpec, PluginSpec, TrainingEngineSpec
from .errors import MisspeltHook, PluginError, did_you_mean

API_VERSION = 1
OLDEST_API_VERSION = 1

_CARDS: dict[str, tuple[str, type[PluginSpec], type[Capability]]] = {
    "art_register_backends": ("backend", BackendSpec, BackendCapability),
    "art_register_inference_engines": ("inference engine", InferenceEngineSpec, InferenceCapability),
    "art_register_training_engines": ("training engine", TrainingEngineSpec, TrainingCapability),
}


def refused_range(line: str) -> str:
    """Why the installed art-core is outside what a plugin's requirement asks for, or an empty string."""
    # Together a fifth of `import art_core`, which needs neither until plugins load.
    from importlib import metadata

    from packaging.requirements import InvalidRequirement, Requirement

    try:
        requirement, version = Requirement(line), metadata.version("art-core")
    except (InvalidRequirement, metadata.PackageNotFoundError):
        return ""
    other = requirement.name.lower().replace("_", "-") != "art-core"
    unasked = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
    if other or unasked or requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"it needs art-core {requirement.specifier}, installed is {version}; upgrade the one or the other"


def refused_api(api: int, distribution: str) -> str:
    """Why a plugin of this plugin API cannot be used, or an empty string."""
    if OLDEST_API_VERSION <= api <= API_VERSION:
        return ""
    side = "upgrade art-core" if api > API_VERSION else f"upgrade {distribution}"
    return f"it speaks plugin API {api}, art-core speaks {OLDEST_API_VERSION} to {API_VERSION}; {side}"


def implemented_hooks(hooks: pluggy.PluginManager, plugin: object) -> list[str]:
    """The hooks that a plugin implements.

    Raises MisspeltHook for one that doesn't exist, has lost its decorator, or could not be called as hooks are.
    """
    known = {name for name in vars(hookspecs) if name.startswith("art_")}
    implemented = []
    for name in dir(plugin):
        options = hooks.parse_hookimpl_opts(plugin, name)
        if options is None:
            if name in known and callable(getattr(plugin, name)):
                raise MisspeltHook(f"its {name} is not decorated with @hookimpl, so it would never be called")
            if name.startswith("art_") and _defined_in(plugin, name):
                raise MisspeltHook(f"it defines {name}, which is not a hook.{did_you_mean(name, known)}")
            continue
        hook = options.get("specname") or name
        if hook not in known:
            raise MisspeltHook(f"it implements {hook}, which is not a hook.{did_you_mean(hook, known)}")
        if options.get("wrapper") or options.get("hookwrapper"):
            raise MisspeltHook(f"its {hook} is a wrapper; the hooks of ART are called one by one and can't be wrapped")
        _check_signature(hook, getattr(plugin, name))
        implemented.append(hook)
    return implemented


def _check_signature(hook: str, function: Callable[..., object]) -> None:
    given = list(inspect.signature(getattr(hookspecs, hook)).parameters)
    taken = [p for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    unknown = [repr(p.name) for p in taken if p.default is p.empty and p.name not in given]
    if unknown:
        form = f"{hook}({', '.join(given)})"
        raise MisspeltHook(f"its {hook} takes {', '.join(unknown)}, which it isn't given. Take what you need of {form}")
    if inspect.iscoroutinefunction(function) and hook.startswith(("art_register_", "art_resolve_")):
        raise MisspeltHook(f"its {hook} is async, and nobody would await it; write `def {hook}`")


def registered_cards(hooks: pluggy.PluginManager, plugin: object) -> list[tuple[str, PluginSpec]]:
    """The cards that a registered plugin gives, each with its kind. Raises PluginError for what is no card."""
    cards: list[tuple[str, PluginSpec]] = []
    for hook, (kind, expected, members) in _CARDS.items():
        for implementation in getattr(hooks.hook, hook).get_hookimpls():
            if implementation.plugin is not plugin:
                continue
            given = implementation.function()
            if not isinstance(given, Iterable):
                raise PluginError(
                    f"its {hook} must give a list, [{expected.__name__}(...)], not {type(given).__name__}"
                )
            for card in given:
                if not isinstance(card, expected):
                    raise PluginError(f"its {hook} must give {expected.__name__} objects, not {type(card).__name__}")
                for each in getattr(card, "capabilities", ()):
                    if not isinstance(each, members):
                        known = f"{members.__name__}, which has {', '.join(members.__members__)}"
                        raise PluginError(f"{card.name!r} declares the capability {each!r}, no member of {known}")
                if not all(card.factory.partition(":")):
                    raise PluginError(f"the factory of {card.name!r} is {card.factory!r}, not 'module:attribute'")
                if (kind, card.name) in ((k, c.name) for k, c in cards):
                    raise PluginError(f"it provides the {kind} {card.name!r} twice")
                cards.append((kind, card))
    return cards


def _defined_in(plugin: object, name: str) -> bool:
    return inspect.isfunction(function := getattr(plugin, name)) and (
        not isinstance(plugin, ModuleType) or function.__module__ == plugin.__name__
    )
