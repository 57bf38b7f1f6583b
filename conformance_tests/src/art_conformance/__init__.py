"""What every ART backend, engine and plugin must do, as base classes for pytest.

A third party writes `class TestMine(InferenceEngineConformance)` and one fixture. The names are imported on first use,
because pytest loads this package in every run.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import catalogue
from .requirements import MUST, SHOULD, Level, Requirement, check

if TYPE_CHECKING:
    from .backend_suite import BackendConformance
    from .inference_suite import InferenceEngineConformance
    from .plugin_suite import PluginConformance
    from .publication_suite import PublicationConformance
    from .tracker_reports import KeptModel, KeptRow
    from .tracker_suite import TrackerConformance
    from .training_suite import TrainingEngineConformance

__all__ = [
    "MUST",
    "SHOULD",
    "BackendConformance",
    "InferenceEngineConformance",
    "KeptModel",
    "KeptRow",
    "Level",
    "PluginConformance",
    "PublicationConformance",
    "Requirement",
    "TrackerConformance",
    "TrainingEngineConformance",
    "check",
]


def __getattr__(name: str) -> Any:
    if name in ("KeptModel", "KeptRow"):
        return getattr(import_module(".tracker_reports", __name__), name)
    if name not in catalogue.SUITES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return catalogue.suite(name)
