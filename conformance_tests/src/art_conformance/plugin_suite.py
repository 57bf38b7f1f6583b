"""What any plugin of ART must be, whatever it provides: light to import, within its version gates, true to its card.

Looks at an installed plugin by the name of its entry point. Starts nothing but short Python processes.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from importlib import import_module, metadata
from typing import Any

import pytest
from packaging.requirements import Requirement as PipRequirement

from art_core import (
    API_VERSION,
    Backend,
    BackendCapability,
    BackendSpec,
    InferenceCapability,
    InferenceEngine,
    InferenceEngineSpec,
    TrainingCapability,
    TrainingEngine,
    TrainingEngineSpec,
    hookspecs,
)
from art_core.engines import PluginSpec
from art_core.loading import PluginInfo, PluginStatus
from art_core.plugin_gates import refused_api
from art_core.registry import instantiate

from .plugin_fixtures import PluginFixtures
from .requirements import MUST, SHOULD, check

HEAVY = (
    *("torch", "transformers", "peft", "vllm", "sglang", "unsloth", "torchtune", "jax", "tensorflow", "accelerate"),
    *("datasets", "pandas", "polars", "pyarrow", "scipy", "sklearn", "matplotlib", "wandb", "trl", "deepspeed"),
)
_PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_KINDS: dict[str, tuple[type[PluginSpec], type]] = {
    "art_register_backends": (BackendSpec, BackendCapability),
    "art_register_inference_engines": (InferenceEngineSpec, InferenceCapability),
    "art_register_training_engines": (TrainingEngineSpec, TrainingCapability),
}
_PROTOCOLS: dict[type[PluginSpec], type] = {
    BackendSpec: Backend,
    InferenceEngineSpec: InferenceEngine,
    TrainingEngineSpec: TrainingEngine,
}
# Run in a fresh interpreter, since this one has long imported what a plugin must not.
_IMPORT = """
import importlib, json, os, signal, sys, warnings
import art_core
module, factories, instances, heavy = json.loads(sys.argv[1])
before = (dict(os.environ), os.getcwd(), {s: str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)})
plugin = importlib.import_module(module)
heavy_by_module = sorted(set(heavy) & set(sys.modules))
found = []
for factory in factories:
    name, _, attribute = factory.partition(":")
    found.append(importlib.import_module(name))
    for part in attribute.split("."):
        found[-1] = getattr(found[-1], part)
for index in instances:
    found[index]()
after = (dict(os.environ), os.getcwd(), {s: str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)})
print("RESULT" + json.dumps({
    "heavy_by_module": heavy_by_module,
    "heavy_by_factory": sorted(set(heavy) & set(sys.modules)),
    "environment": sorted(k for k in before[0].keys() | after[0].keys() if before[0].get(k) != after[0].get(k)),
    "folder": before[1] != after[1],
    "signals": before[2] != after[2],
}))
"""


class PluginConformance(PluginFixtures):
    """Give the fixture `plugin_name`: the name of an installed entry point in the group `art`."""

    @pytest.fixture(scope="class")
    @classmethod
    def module(cls, entry_point: metadata.EntryPoint) -> Any:
        return entry_point.load()

    @pytest.fixture(scope="class")
    @classmethod
    def cards(cls, module: Any) -> list[tuple[str, Any]]:
        """Every card with the hook that gave it."""
        return [(hook, card) for hook in _KINDS if hasattr(module, hook) for card in getattr(module, hook)()]

    @pytest.fixture(scope="class")
    @classmethod
    def imported(cls, entry_point: metadata.EntryPoint, cards: list[tuple[str, Any]]) -> dict[str, Any]:
        """What a fresh interpreter saw when it imported the plugin, its factories, and made its engines."""
        factories = [card.factory for _, card in cards]
        instances = [index for index, (hook, _) in enumerate(cards) if hook != "art_register_backends"]
        argument = json.dumps([entry_point.value.partition(":")[0], factories, instances, HEAVY])
        # Not this process's whole environment: the plugin was imported here before, and may have left its traces.
        kept = {
            name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG", "SYSTEMROOT") if name in os.environ
        }
        environment = {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.run(
            [sys.executable, "-c", _IMPORT, argument], capture_output=True, text=True, timeout=120, env=environment
        )
        assert process.returncode == 0, f"importing it in a fresh interpreter failed: {process.stderr[-2000:]}"
        found: dict[str, Any] = json.loads(process.stdout.rpartition("RESULT")[2])
        return found

    @check("PLG-001", MUST, "The loader finds the plugin by its entry point and counts it as active.")
    def test_is_active(self, info: PluginInfo) -> None:
        assert info.status is PluginStatus.ACTIVE, info.error

    @check("PLG-002", MUST, "The plugin module has an integer `art_api` that this art-core speaks.")
    def test_declares_api(self, module: Any) -> None:
        api = getattr(module, "art_api", None)
        assert type(api) is int, f"art_api is {api!r}; write `art_api = {API_VERSION}`"
        refused = refused_api(api, "the plugin")
        assert not refused, refused

    @check(
        "PLG-003", MUST, "Every function of the plugin called `art_…` is a hook and takes only that hook's arguments."
    )
    def test_hooks_exist(self, module: Any) -> None:
        implemented = [n for n in dir(module) if n.startswith("art_") and inspect.isroutine(getattr(module, n))]
        known = {name for name in vars(hookspecs) if name.startswith("art_")}
        for name in implemented:
            assert name in known, f"{name} is not a hook of ART; the hooks are {', '.join(sorted(known))}"
            given = set(inspect.signature(getattr(module, name)).parameters) - {"self"}
            unknown = given - set(inspect.signature(getattr(hookspecs, name)).parameters)
            assert not unknown, f"{name} takes {sorted(unknown)}, which the hook does not give"
        assert implemented, "it implements no hook, so it does nothing"

    @check("PLG-004", MUST, "Importing the plugin imports no machine-learning or data library.")
    def test_import_is_light(self, imported: dict[str, Any]) -> None:
        assert not imported["heavy_by_module"], f"importing the plugin imports {imported['heavy_by_module']}"

    @check("PLG-005", MUST, "Importing a factory, and making an engine, imports no machine-learning library either.")
    def test_factories_are_light(self, imported: dict[str, Any]) -> None:
        light_enough = {"pandas", "polars", "pyarrow"}  # trackers need one of these to write; a client has them anyway
        heavy = set(imported["heavy_by_factory"]) - light_enough
        assert not heavy, f"importing and making what it provides imports {sorted(heavy)}"

    @check("PLG-006", MUST, "Importing the plugin changes no environment variable, working folder or signal handler.")
    def test_import_changes_nothing(self, imported: dict[str, Any]) -> None:
        assert not imported["environment"], f"it changes the environment variables {imported['environment']}"
        assert not imported["folder"], "it changes the working folder"
        assert not imported["signals"], "it changes signal handlers"

    @check("PLG-007", MUST, "The distribution requires art-core with a floor and a ceiling.")
    def test_requires_art_core(self, entry_point: metadata.EntryPoint) -> None:
        assert entry_point.dist is not None, "its entry point belongs to no distribution"
        lines = [PipRequirement(line) for line in entry_point.dist.requires or ()]
        ours = [line for line in lines if line.name.lower().replace("_", "-") == "art-core" and line.marker is None]
        assert ours, f"{entry_point.dist.name} does not require art-core; write art-core>=0.1,<0.2"
        operators = {specifier.operator for line in ours for specifier in line.specifier}
        assert operators & {">=", ">", "~=", "=="}, f"{ours[0]} has no floor; write art-core>=0.1,<0.2"
        assert operators & {"<", "<=", "~=", "=="}, f"{ours[0]} has no ceiling; write art-core>=0.1,<0.2"

    @check("PLG-008", MUST, "Registration hooks give cards of their kind, the same ones at every call.")
    def test_cards(self, module: Any, cards: list[tuple[str, Any]]) -> None:
        for hook, card in cards:
            assert isinstance(card, _KINDS[hook][0]), f"{hook} gives {card!r}, not a {_KINDS[hook][0].__name__}"
        again = [(hook, card) for hook in _KINDS if hasattr(module, hook) for card in getattr(module, hook)()]
        assert again == cards

    @check("PLG-009", MUST, "Every card has a plain name and a summary of one sentence.")
    def test_cards_are_described(self, cards: list[tuple[str, Any]]) -> None:
        for _, card in cards:
            assert _PLAIN_NAME.fullmatch(card.name), (
                f"{card.name!r} is not a plain name: lower-case letters, digits, '-' and '_'"
            )
            assert len(card.summary.split()) >= 3, f"the summary of {card.name} says nothing: {card.summary!r}"
            assert card.summary.endswith("."), f"the summary of {card.name} is no sentence: {card.summary!r}"

    @check("PLG-010", MUST, "The capabilities on a card are members of the enumeration of its kind.")
    def test_capabilities_are_members(self, cards: list[tuple[str, Any]]) -> None:
        for hook, card in cards:
            wrong = [c for c in card.capabilities if not isinstance(c, _KINDS[hook][1])]
            assert not wrong, f"{card.name} declares {wrong}, which are not {_KINDS[hook][1].__name__}"

    @check("PLG-011", MUST, "Every factory can be imported, and that of an engine can be called without arguments.")
    def test_factories_work(self, cards: list[tuple[str, Any]]) -> None:
        for hook, card in cards:
            if hook == "art_register_backends":
                assert callable(_factory_of(card)), f"{card.factory} is not callable"
            else:
                instantiate(card)

    @check("PLG-012", MUST, "An engine has every member of its protocol, with the protocol's parameters.")
    def test_protocols(self, cards: list[tuple[str, Any]]) -> None:
        for _, card in cards:
            protocol = _PROTOCOLS[type(card)]
            factory = _factory_of(card)
            if type(card) is BackendSpec and not inspect.isclass(factory):
                continue  # a function that makes the backend: BCK-001 looks at what it makes
            subject = factory if type(card) is BackendSpec else factory()
            for name, wanted in vars(protocol).items():
                if name.startswith("_") or not (inspect.isfunction(wanted) or isinstance(wanted, property)):
                    continue
                due = f"art_core.{protocol.__name__} has `{_line_of(name, wanted)}`"
                assert hasattr(subject, name), f"{card.name} lacks {name}. {due}; write one like it"
                if inspect.isfunction(wanted):
                    _same_form(f"{card.name}.{name}", due, wanted, getattr(subject, name))

    @check("PLG-013", MUST, "An engine's name and capabilities are those on its card.")
    def test_instances_match_cards(self, cards: list[tuple[str, Any]]) -> None:
        for hook, card in cards:
            if hook == "art_register_backends":
                continue  # a backend's may depend on how it is configured: BCK-002
            engine = instantiate(card)
            assert engine.name == card.name
            assert frozenset(engine.capabilities) == card.capabilities, (
                f"{card.name} says {sorted(map(str, engine.capabilities))},"
                f" its card says {sorted(map(str, card.capabilities))}"
            )

    @check("PLG-014", SHOULD, "The plugin's package ships a py.typed marker.")
    def test_is_typed(self, entry_point: metadata.EntryPoint) -> None:
        package = import_module(entry_point.module.partition(".")[0])
        folders = list(getattr(package, "__path__", []))
        assert any(os.path.exists(os.path.join(folder, "py.typed")) for folder in folders), (
            f"no py.typed in {folders or 'a single-file module'}"
        )


def _factory_of(card: Any) -> Any:
    name, _, attribute = card.factory.partition(":")
    found: Any = import_module(name)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _line_of(name: str, wanted: Any) -> str:
    """The protocol's own line."""
    if isinstance(wanted, property):
        return f"{name}: {inspect.signature(wanted.fget).return_annotation}"  # type: ignore[arg-type]
    text = str(inspect.signature(wanted)).replace("'", "")
    return f"{'async ' if inspect.iscoroutinefunction(wanted) else ''}def {name}{text}"


def _same_form(method: str, due: str, wanted: Any, given: Any) -> None:
    assert callable(given), f"{method} is a {type(given).__name__}, and no method. {due}"
    if inspect.iscoroutinefunction(given) and not inspect.iscoroutinefunction(wanted):
        pytest.fail(f"{method} is `async def`, and nobody awaits it. {due}; write `def`", pytrace=False)
    if inspect.iscoroutinefunction(wanted) and _is_plainly_not_async(given):
        pytest.fail(f"{method} is `def`, and is awaited. {due}; write `async def`", pytrace=False)
    theirs = inspect.signature(given).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in theirs.values()):
        return
    for parameter in list(inspect.signature(wanted).parameters.values())[1:]:
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD and parameter.name not in theirs:
            pytest.fail(
                f"{method} takes {', '.join(name for name in theirs if name != 'self') or 'nothing'}, and no"
                f" {parameter.name!r}. {due}; name its parameters as they are there",
                pytrace=False,
            )


def _is_plainly_not_async(given: Any) -> bool:
    """It gives something that no `await` takes, by its own annotation; a wrapper may give a coroutine all the same."""
    annotation = inspect.signature(given).return_annotation
    awaitable = ("Awaitable", "Coroutine", "Future", "Task", "Any")
    return (
        not inspect.iscoroutinefunction(inspect.unwrap(given))
        and annotation is not inspect.Parameter.empty
        and not any(name in str(annotation) for name in awaitable)
    )
