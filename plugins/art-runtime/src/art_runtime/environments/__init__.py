"""The environments that engines run in: which they are, where an engine's interpreter is, made, examined, removed.

What other packages ask is named here; making and examining (`install`, `doctor`) are imported by who does it.
"""

from .locate import EnginePython, first_met, locate, python_for
from .places import (
    EngineEnvironment,
    EngineSpec,
    EnvironmentMissing,
    engine_folder,
    engine_for,
    environment_for,
    environment_spec,
    machine_flavour,
)

__all__ = [
    "EngineEnvironment",
    "EnginePython",
    "EngineSpec",
    "EnvironmentMissing",
    "engine_folder",
    "engine_for",
    "environment_for",
    "environment_spec",
    "first_met",
    "locate",
    "machine_flavour",
    "python_for",
]
