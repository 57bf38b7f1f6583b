"""What a run by name checks: the options, or the embedded defaults when none is given. Makes instances from cards."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from art_core import InferenceEngine, InferenceLaunch, PluginRegistry
from art_core.errors import PluginNotInstalled
from art_engine_kit.environment import Flavour
from art_runtime.environments import EngineSpec, engine_for, python_for

DEFAULT_BACKEND, DEFAULT_ENGINE = "local", "torch"


@dataclass(frozen=True)
class Targets:
    """The names on the command line. Engines None: the backend chooses."""

    backend: str
    inference_engine: str
    training_engine: str
    backend_args: Mapping[str, Any] = field(default_factory=dict)
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    engine_python: str | None = None


def targets(config: pytest.Config) -> Targets:
    """Read the options. Raises pytest.UsageError for JSON that isn't an object."""
    return Targets(
        backend=config.getoption("--backend") or DEFAULT_BACKEND,
        inference_engine=config.getoption("--inference-engine") or DEFAULT_ENGINE,
        training_engine=config.getoption("--training-engine") or DEFAULT_ENGINE,
        backend_args=_object(config, "--backend-args"),
        engine_args=_object(config, "--engine-args"),
        engine_python=config.getoption("--engine-python"),
    )


def backend_arguments(config: pytest.Config, folder: Path) -> dict[str, Any]:
    """The backend's keyword arguments for one instance, and the engines that the command line names."""
    chosen = targets(config)
    arguments = {
        name: value.replace("{tmp}", str(folder)) if isinstance(value, str) else value
        for name, value in chosen.backend_args.items()
    }
    for option, argument in (("--inference-engine", "inference_engine"), ("--training-engine", "training_engine")):
        if config.getoption(option):
            arguments[argument] = config.getoption(option)
    return arguments


def inference_engine(config: pytest.Config, registry: PluginRegistry) -> Any:
    """The inference engine to check."""
    return engine_for(registry.inference_engine(targets(config).inference_engine))


def training_engine(config: pytest.Config, registry: PluginRegistry) -> Any:
    """The training engine to check."""
    return engine_for(registry.training_engine(targets(config).training_engine))


def interpreter_of(
    config: pytest.Config, card_of: Callable[[str], EngineSpec], engine: str, flavour: Flavour | None = None
) -> str:
    """The interpreter of an engine's environment: --engine-python, or where its card says; this one for an engine that
    no plugin registers yet. Raises EnvironmentMissing with the command that installs it.
    """
    given = targets(config).engine_python
    try:
        card = card_of(engine)
    except PluginNotInstalled:
        return given or sys.executable
    return python_for(card, python=given, flavour=flavour)


def command_of(engine: InferenceEngine, base_model: Path) -> tuple[str, ...]:
    """The words after the interpreter on the command line of an engine's server, up to the first that depends on what
    is served.
    """
    plans = [
        engine.launch(
            InferenceLaunch(
                base_model=base_model,
                served_name=f"name-{port}",
                host="127.0.0.1",
                port=port,
                api_key="unused",
                python=sys.executable,
            )
        )
        for port in (20001, 20002)
    ]
    words = []
    for one, other in zip(plans[0].argv[1:], plans[1].argv[1:], strict=True):
        if one != other or one.startswith("--"):
            break
        words.append(one)
    return tuple(words)


def plugin_names(config: pytest.Config, registry: PluginRegistry) -> list[str]:
    """The plugins to check: those named, or those that provide what is named, or every one that is installed."""
    named = config.getoption("--plugin")
    if named:
        return list(named)
    provided = {
        f"{kind} {config.getoption(option)}"
        for kind, option in (
            ("backend", "--backend"),
            ("inference engine", "--inference-engine"),
            ("training engine", "--training-engine"),
        )
        if config.getoption(option)
    }
    infos = [info for info in registry.infos if not provided or provided & set(info.provides)]
    return [info.name for info in infos]


def _object(config: pytest.Config, option: str) -> dict[str, Any]:
    try:
        value = json.loads(config.getoption(option))
    except ValueError as error:
        raise pytest.UsageError(f"{option} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise pytest.UsageError(f"{option} must be a JSON object, such as {{}}")
    return value
