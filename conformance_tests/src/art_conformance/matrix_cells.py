"""What the conformance matrix is made of: a cell for each suite and each combination of installed plugins.

Knows which plugins are installed and which of pytest's tests a cell runs; runs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from art_core import BackendCapability, PluginRegistry
from art_core.errors import PluginNotInstalled, did_you_mean

from .targets import DEFAULT_BACKEND, DEFAULT_ENGINE

_MODULE = "art_conformance.by_name.test_by_name"
_OF_A_BACKEND = ("PublicationConformance", "BackendConformance")
_OF_A_TRACKER = ("PluginConformance", "TrackerConformance")
_LOGGED = frozenset({"art_log_metrics", "art_log_trajectories"})


@dataclass(frozen=True)
class Cell:
    """One run of pytest: which classes, with which options, and the engines whose environments it needs.

    `suites` are those that whoever is conformant has been held against. `plugins` says what it is about, by what the
    plugin provides ("backend local") or its name; none: about everything. `tests` is a test file that stands in for
    the classes; `lacks` says why the cell can't be run.
    """

    name: str
    classes: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    suites: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
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
    """What was asked for, or everything that is installed where nothing was; the embedded default comes first. Who asks
    for engines or backends only gets no trackers, and who asks for trackers only nothing else.

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
    asked_trackers = list(trackers)
    if asked_trackers and not any(asked.values()):
        return Chosen([], [], [], _trackers(registry, asked_trackers))
    inference_engines, training_engines, all_backends = (
        names or sorted(registry.provided(kind), key=lambda name: (name not in first, name))  # type: ignore[arg-type]
        for kind, names in asked.items()
    )
    unasked = any(asked.values()) and not asked_trackers
    shown = () if unasked else _trackers(registry, asked_trackers)
    return Chosen(inference_engines, training_engines, all_backends, shown)


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
    made = [Cell("plugins", ("TestPlugin",), suites=("PluginConformance",))]
    for tracker in names.trackers:
        why = "" if tracker in tests else f"how what it keeps is read back is not known. Say so, --tests {tracker}=FILE"
        file = tests.get(tracker, "")
        made.append(Cell(f"tracker-{tracker}", suites=_OF_A_TRACKER, plugins=(tracker,), tests=file, lacks=why))
    made += [
        Cell(
            f"inference-{name}",
            ("TestInferenceEngine",),
            ("--inference-engine", name),
            suites=("InferenceEngineConformance",),
            plugins=(f"inference engine {name}",),
            inference_engine=name,
        )
        for name in names.inference_engines
    ]
    made += [
        Cell(
            f"training-{name}",
            ("TestTrainingEngine",),
            ("--training-engine", name),
            suites=("TrainingEngineConformance",),
            plugins=(f"training engine {name}",),
            training_engine=name,
        )
        for name in names.training_engines
    ]
    classes = ("TestPublication", "TestBackend")
    for backend in names.backends:
        given = ("--backend-args", backend_args[backend]) if backend in backend_args else ()
        if backend in tests:
            # What its test file starts besides is not known.
            made.append(Cell(f"backend-{backend}", suites=_OF_A_BACKEND, tests=tests[backend]))
            continue
        if backend in remote and not given:
            why = (
                f"it trains on another machine. Say which, --backend-args {backend}=JSON, or give a test file that"
                f" starts one, --tests {backend}=FILE"
            )
            made.append(Cell(f"backend-{backend}", classes, suites=_OF_A_BACKEND, lacks=why))
            continue
        if backend != DEFAULT_BACKEND:
            made.append(Cell(f"backend-{backend}", classes, ("--backend", backend, *given), suites=_OF_A_BACKEND))
            continue
        made += [
            Cell(
                f"backend-{backend}-{inference}-{training}",
                classes,
                ("--backend", backend, "--inference-engine", inference, "--training-engine", training, *given),
                suites=_OF_A_BACKEND,
                plugins=(f"backend {backend}", f"inference engine {inference}", f"training engine {training}"),
                inference_engine=inference,
                training_engine=training,
            )
            for inference in names.inference_engines
            for training in names.training_engines
        ]
    return made


def of_the_default(cell: str) -> bool:
    """Whether a cell of that name is about what is embedded by default: backend local with engine torch for both."""
    engines = (f"inference-{DEFAULT_ENGINE}", f"training-{DEFAULT_ENGINE}")
    return cell in (*engines, f"backend-{DEFAULT_BACKEND}-{DEFAULT_ENGINE}-{DEFAULT_ENGINE}")
