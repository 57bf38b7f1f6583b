"""What is installed and kept for ART: plugins, engines with their environments, the cache. Imports no engine."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from art_core import ArtError, installed_plugins
from art_core.loading import PluginStatus
from art_engine_kit.live_folders import bytes_below, entries_in
from art_engine_kit.user_folders import cache_dir

from ..environments import EngineSpec, EnvironmentMissing, environment_for, locate
from ..environments.places import MARKER
from .finding import Finding, State

# Whoever makes an environment or a model writes to it all the time.
_LEFT_AFTER_S = 3600.0


def plugins() -> Iterator[Finding]:
    """Plugins that are broken, incompatible or there twice; how many are active."""
    with warnings.catch_warnings():
        # The findings say it.
        warnings.simplefilter("ignore", RuntimeWarning)
        infos = installed_plugins().infos
    active = [info for info in infos if info.status is PluginStatus.ACTIVE]
    for info in infos:
        if info.status is not PluginStatus.ACTIVE:
            state = State.NOTE if info.status is PluginStatus.DISABLED else State.WRONG
            says = f"{info.name} ({info.distribution} {info.version}) is {info.status.value}: {info.error}"
            mend = f"pip install --upgrade {info.distribution}, or pip uninstall {info.distribution}"
            yield Finding(about="plugins", state=state, says=says, mend="" if state is State.NOTE else mend)
    if active:
        yield Finding(about="plugins", state=State.OK, says=f"active: {', '.join(info.name for info in active)}")
    provided = {kind.partition(" ")[0] for info in active for kind in info.provides}
    for kind, mend in (("backend", "pip install art-backend-local"), ("inference", "pip install art-engine-torch")):
        if kind not in provided:
            words = "no backend: nothing can be trained" if kind == "backend" else "no inference engine"
            yield Finding(about="plugins", state=State.WRONG, says=words, mend=mend)


def engines() -> Iterator[Finding]:
    """Where each engine runs, or the line that makes its environment."""
    registry = installed_plugins()
    specs: dict[str, EngineSpec] = {
        name: registry.training_engine(name) for name in registry.provided("training engine")
    }
    specs |= {name: registry.inference_engine(name) for name in registry.provided("inference engine")}
    for name, spec in sorted(specs.items()):
        try:
            found = locate(spec)
        except EnvironmentMissing as error:
            if error.environment is None:
                yield Finding(about="engines", state=State.NOTE, says=f"{name}: {error}")
                continue
            size = error.environment.spec.disk_bytes
            says = f"{name}: its environment isn't made yet" + (f" (about {size / 1e9:.1f} GB)" if size else "")
            yield Finding(about="engines", state=State.NOTE, says=says, mend=error.environment.install_command)
        except ArtError as error:
            says = f"{name}: {error}"
            yield Finding(about="engines", state=State.WRONG, says=says, mend=f"art engines install {name} --again")
        else:
            yield Finding(about="engines", state=State.OK, says=f"{name} runs in {found.why}")


def caches() -> Iterator[Finding]:
    """How much ART keeps, and what can go: environments of older requirements, what killed processes left."""
    folder = cache_dir()
    size = bytes_below(folder)
    yield Finding(about="caches", state=State.OK, says=f"{size / 1e9:.1f} GB in {folder}")
    for left in _left_over(folder):
        says = f"{left} was left by a process that ended before it was done, {bytes_below(left) / 1e9:.1f} GB"
        yield Finding(about="caches", state=State.NOTE, says=says, mend=f"rm -r {left}")
    for old in _outdated(folder):
        says = f"{old} is for other requirements than this version's, {bytes_below(old) / 1e9:.1f} GB"
        yield Finding(about="caches", state=State.NOTE, says=says, mend=f"rm -r {old}")


def _left_over(cache: Path) -> Iterator[Path]:
    for path in entries_in(cache / "models"):
        if path.name.startswith(".making-") and _is_old(path):
            yield path
    for engine in entries_in(cache / "engines"):
        for path in entries_in(engine):
            if path.is_dir() and not (path / MARKER).exists() and _is_old(path):
                yield path


def _outdated(cache: Path) -> Iterator[Path]:
    registry = installed_plugins()
    for name in registry.provided("inference engine"):
        spec = registry.inference_engine(name)
        for path in entries_in(cache / "engines" / name):
            if not (path / MARKER).exists():
                continue
            flavour = path.name.partition("-")[0]
            try:
                current = environment_for(spec, "cuda" if flavour == "cuda" else "cpu").folder
            except (ArtError, EnvironmentMissing):
                continue
            if path != current:
                yield path


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _LEFT_AFTER_S
    except FileNotFoundError:
        return False
