"""Describes where a figure was measured: machine, load, versions of what took part. Starts nothing."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from art_core import installed_plugins
from art_runtime import accelerators
from art_runtime.environments import environment_for, environment_spec, first_met


def machine() -> str:
    """Processor, cores, GPUs, system and how busy it is, in one line."""
    gpus = "".join(f", {gpu.name} ({gpu.memory_mib / 1024:.0f} GiB)" for gpu in accelerators())
    return (
        f"{_processor()}, {os.cpu_count()} cores{gpus}, {platform.system()} {platform.release()}, Python"
        f" {platform.python_version()}, load {os.getloadavg()[0]:.1f} before"
    )


def versions(engines: Iterable[str], distributions: Sequence[str] = ()) -> str:
    """The versions of inference engines, each from the environment that it runs in, and of distributions from ours."""
    parts = [f"{name} ({', '.join(f'{k} {v}' for k, v in _engine_versions(name).items())})" for name in engines]
    return "; ".join([*parts, *(f"{name} {version(name)}" for name in distributions)])


def _engine_versions(name: str) -> dict[str, str]:
    spec = installed_plugins().inference_engine(name)
    environment = environment_spec(spec)
    if environment is None:
        return {distribution: version(distribution) for distribution in ("torch", "transformers")}
    here = first_met(environment.provided_by)
    if here is not None:
        return {distribution: version(distribution) for distribution in environment.shown}
    return dict(environment_for(spec).facts().get("versions", {}))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
