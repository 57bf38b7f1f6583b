"""Says what is wrong with an engine's environment: asks its interpreter for versions, runs the engine's own probe."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import Final

from art_engine_kit.environment import Flavour
from art_engine_kit.process_environment import process_environment

from .locate import EnginePython, locate
from .places import EngineSpec, environment_spec, flavour_of, machine_flavour

_VERSIONS_LIMIT_S: Final = 120.0
_PROBE_LIMIT_S: Final = 300.0
_VERSIONS: Final = """
import json, platform, sys
from importlib import metadata
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found: the interpreter, versions by distribution, and what is wrong (empty: nothing)."""

    python: EnginePython
    flavour: Flavour
    versions: dict[str, str]
    problem: str = ""


def examine(spec: EngineSpec, *, python: str | None = None, flavour: Flavour | None = None) -> Diagnosis:
    """Find an engine's interpreter, and see whether the engine works in it. Takes up to minutes: it imports the engine.

    Raises EnvironmentMissing when there is no interpreter.
    """
    found = locate(spec, python=python, flavour=flavour)
    environment = environment_spec(spec)
    chosen = flavour or machine_flavour() if environment is None else flavour_of(environment, flavour)
    shown = environment.shown if environment is not None else ("torch", "transformers")
    answer = _ask([found.path, "-c", _VERSIONS, *shown], {}, _VERSIONS_LIMIT_S)
    if answer.returncode != 0:
        problem = f"its interpreter doesn't run: {_end(answer)}"
        return Diagnosis(python=found, flavour=chosen, versions={}, problem=problem)
    versions: dict[str, str] = json.loads(answer.stdout.splitlines()[-1])
    if environment is None:
        return Diagnosis(python=found, flavour=chosen, versions=versions)
    if chosen not in environment.flavours:
        problem = f"the engine has no flavour {chosen!r}"
        return Diagnosis(python=found, flavour=chosen, versions=versions, problem=problem)
    wanted = environment.flavours[chosen]
    probe = _ask([found.path, *wanted.probe], dict(wanted.probe_env), _PROBE_LIMIT_S)
    problem = "" if probe.returncode == 0 else f"the engine can't be used in it: {_end(probe)}"
    return Diagnosis(python=found, flavour=chosen, versions=versions, problem=problem)


def _ask(command: list[str], env: dict[str, str], limit_s: float) -> subprocess.CompletedProcess[str]:
    environment = process_environment({"PYTHONPATH": "", **env})
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=limit_s,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {limit_s:g} s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _end(answer: subprocess.CompletedProcess[str], lines: int = 12) -> str:
    text = "\n".join(answer.stderr.strip().splitlines()[-lines:])
    return f"exit code {answer.returncode}\n{text or answer.stdout[-1000:]}"
