"""What the conformance matrix is made of: a cell for each suite and each combination of installed plugins.

Knows which plugins are installed and which of pytest's tests a cell runs; runs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from platform import machine, python_version, system
from typing import Any

from art_core import BackendCapability, PluginRegistry
from art_core.errors import PluginNotInstalled, did_you_mean
from art_runtime.environments import EngineSpec, environment_for, python_for

from .targets import DEFAULT_BACKEND, DEFAULT_ENGINE

_MODULE = "art_conformance.by_name.test_by_name"
# Beside ART's own, what decides how an engine in the client's environment behaves.
_SHOWN = ("torch", "transformers", "peft")
_LOGGED = frozenset({"art_log_metrics", "art_log_trajectories"})


@dataclass(frozen=True)
class Cell:
    """One run of pytest: which classes, with which options, and the engines whose environments it needs.

    `tests` is a test file that stands in for the classes; `lacks` says why the cell can't be run.
    """

    name: str
    classes: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    inference_engine: str | None = None
    training_engine: str | None = None
    tests: str = ""
    lacks: str = ""

    @property
    def arguments(self) -> list[str]:
        """What pytest is given."""
        if self.tests:
            return [self.tests]
        return [*self.options, "--pyargs", *(f"{_MODULE}::{name}" for name in self.classes)]


@dataclass(frozen=True)
class Chosen:
    """The names a matrix is made of, each in the order in which it is shown."""

    inference_engines: Sequence[str]
    training_engines: Sequence[str]
    backends: Sequence[str]
    trackers: Sequence[str] = ()


def chosen(
    registry: PluginRegistry,
    inference: Iterable[str],
    training: Iterable[str],
    backends: Iterable[str],
    trackers: Iterable[str] = (),
) -> Chosen:
    """What was asked for, or everything that is installed where nothing was; the embedded default comes first.

    Raises PluginNotInstalled for a name that isn't there.
    """
    asked = {"inference engine": list(inference), "training engine": list(training), "backend": list(backends)}
    for name in asked["inference engine"]:
        registry.inference_engine(name)
    for name in asked["training engine"]:
        registry.training_engine(name)
    for name in asked["backend"]:
        registry.backend(name)
    first = (DEFAULT_ENGINE, DEFAULT_BACKEND)
    found = [
        names or sorted(registry.provided(kind), key=lambda name: (name not in first, name))  # type: ignore[arg-type]
        for kind, names in asked.items()
    ]
    inference_engines, training_engines, all_backends = found
    return Chosen(inference_engines, training_engines, all_backends, _trackers(registry, list(trackers)))


def _trackers(registry: PluginRegistry, asked: Sequence[str]) -> Sequence[str]:
    there = sorted(info.name for info in registry.infos if _LOGGED & set(info.hooks))
    for name in asked:
        if name not in there:
            raise PluginNotInstalled(
                f"no tracker is called {name!r}.{did_you_mean(name, there)} Installed: {', '.join(there) or 'none'}."
            )
    # A backend may listen to what is logged too; that is for its own suites.
    return asked or [info.name for info in registry.infos if info.name in there and not info.provides]


def elsewhere(registry: PluginRegistry, backends: Iterable[str]) -> frozenset[str]:
    """Those of the backends that train on another machine, as their cards say."""
    artifacts = BackendCapability.CHECKPOINTS_AS_ARTIFACTS
    return frozenset(name for name in backends if artifacts in registry.backend(name).capabilities)


def cells(
    names: Chosen,
    backend_args: Mapping[str, str],
    tests: Mapping[str, str] | None = None,
    remote: Collection[str] = (),
) -> list[Cell]:
    """The cells in the order in which they are run: what costs least and says most first.

    Backend local is held against its suites with every pair of engines, any other once. `tests` are test files of the
    caller's, by backend or tracker. A backend among `remote` needs one, or arguments; a tracker needs one, since only
    its author knows how what it keeps is read back. Without them their cells can't be run.
    """
    tests = tests or {}
    made = [Cell("plugins", ("TestPlugin",))]
    for tracker in names.trackers:
        why = "" if tracker in tests else f"how what it keeps is read back is not known. Say so, --tests {tracker}=FILE"
        made.append(Cell(f"tracker-{tracker}", tests=tests.get(tracker, ""), lacks=why))
    made += [
        Cell(f"inference-{name}", ("TestInferenceEngine",), ("--inference-engine", name), inference_engine=name)
        for name in names.inference_engines
    ]
    made += [
        Cell(f"training-{name}", ("TestTrainingEngine",), ("--training-engine", name), training_engine=name)
        for name in names.training_engines
    ]
    suites = ("TestPublication", "TestBackend")
    for backend in names.backends:
        given = ("--backend-args", backend_args[backend]) if backend in backend_args else ()
        if backend in tests:
            made.append(Cell(f"backend-{backend}", tests=tests[backend]))
            continue
        if backend in remote and not given:
            why = (
                f"it trains on another machine. Say which, --backend-args {backend}=JSON, or give a test file that"
                f" starts one, --tests {backend}=FILE"
            )
            made.append(Cell(f"backend-{backend}", suites, lacks=why))
            continue
        if backend != DEFAULT_BACKEND:
            made.append(Cell(f"backend-{backend}", suites, ("--backend", backend, *given)))
            continue
        made += [
            Cell(
                f"backend-{backend}-{inference}-{training}",
                suites,
                ("--backend", backend, "--inference-engine", inference, "--training-engine", training, *given),
                inference_engine=inference,
                training_engine=training,
            )
            for inference in names.inference_engines
            for training in names.training_engines
        ]
    return made


def versions_of(cell: Cell, registry: PluginRegistry) -> dict[str, str]:
    """What the cell's outcome is true for: the machine, every ART distribution, and what the engines run on.

    Raises EnvironmentMissing, with the command that makes it, when an engine has no environment to run in.
    """
    found = {"machine": f"{system()} {machine()}, {os.cpu_count()} cores", "python": python_version()}
    ours = {d.name: d.version for d in metadata.distributions() if d.name == "art-core" or d.name.startswith("art-")}
    found |= dict(sorted(ours.items()))
    cards: list[EngineSpec] = []
    if cell.inference_engine:
        cards.append(registry.inference_engine(cell.inference_engine))
    if cell.training_engine:
        cards.append(registry.training_engine(cell.training_engine))
    for card in cards:
        python_for(card)
        found |= {f"{card.name}: {name}": version for name, version in _of_environment(card).items()}
    return found


def _of_environment(card: EngineSpec) -> dict[str, str]:
    if card.environment is not None:
        facts: dict[str, Any] = environment_for(card).facts()
        if facts:
            return dict(facts["versions"])
    return {name: version for name in _SHOWN if (version := _version(name))}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
