"""Makes and removes engine environments in the cache, safe against two at once and against a kill half-way.

Each attempt builds in a folder of its own, in the place where it will stay, and a marker that names it is written last.
What a killed attempt left is never taken for an environment and goes with the next one. Knows no engine.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from art_core.atomic_files import write_json_atomically
from art_core.errors import ProcessFailed
from art_engine_kit.live_folders import bytes_below, entries_in, remove_folder
from art_engine_kit.showing import Shown, say
from art_engine_kit.user_folders import CACHE_VARIABLE
from art_engine_kit.waited_lock import held

from ..spawning import last_lines, spawn_tethered
from .indexes import uv_settings
from .places import MARKER, EngineEnvironment, engine_folder

INSTALL_LIMIT_S: Final = 3600.0
_LOG: Final = "install.log"
_LOOK_EVERY_S: Final = 0.2
# Walking a gigabyte of files takes a moment itself.
_MEASURE_EVERY_S: Final = 3.0
_VERSIONS: Final = (
    "import json; from importlib.metadata import distributions;"
    " print(json.dumps({d.name: d.version for d in distributions()}))"
)


def install(environment: EngineEnvironment, *, again: bool = False) -> Path:
    """Install an environment unless it is there, and give its interpreter. `again` makes it anew.

    Another process that is at it already is waited for. Shows progress on stderr. Raises ProcessFailed with the end of
    the log when a step fails; an environment that was there before stays.
    """
    found = environment.python()
    if found is not None and not again:
        return found
    environment.folder.mkdir(parents=True, exist_ok=True)
    with _locked(environment.folder):
        found = environment.python()
        if found is not None and not again:
            return found
        return _build(environment)


def remove(engine: str, flavour: str | None = None) -> list[Path]:
    """Remove an engine's environments (all flavours, or one), those of older requirements too; says which."""
    removed = []
    for folder in entries_in(engine_folder(engine)):
        if not folder.is_dir() or not fnmatch(folder.name, f"{flavour or '*'}-*"):
            continue
        with _locked(folder):
            # Without its marker it counts as missing at once, however long the rest takes.
            (folder / MARKER).unlink(missing_ok=True)
            remove_folder(folder)
        removed.append(folder)
    return removed


def installer() -> str | None:
    """The path of uv, on the PATH or beside this interpreter; None where there is none."""
    return shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))


def steps(
    environment: EngineEnvironment, venv: Path, projects: Path, uv: str | None, indexes: Sequence[str] = ()
) -> list[tuple[str, list[str]]]:
    """The commands that make an environment in `venv`, each with what it does.

    `uv` None: venv and pip do it. `indexes` are arguments that tell uv where packages are.
    """
    python, spec = str(venv / "bin" / "python"), environment.spec
    if uv:
        made = [uv, "venv", "--no-project", "--python", sys.executable, str(venv)]
        add = [uv, "pip", "install", "--python", python, *indexes]
        drop = [uv, "pip", "uninstall", "--python", python]
    else:
        made = [sys.executable, "-m", "venv", str(venv)]
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
        add, drop = [*pip, "install", "--progress-bar", "off"], [*pip, "uninstall", "--yes"]
    found = [("making the environment", made), ("installing what it needs", [*add, *spec.requirements])]
    if spec.without_dependencies:
        found.append(("installing the engine", [*add, "--no-deps", *spec.without_dependencies]))
    for project in spec.local_projects:
        found.append((f"adding {project.name}", [*add, "--no-deps", str(projects / project.name)]))
    if spec.uninstall:
        found.append(("taking out what it doesn't need", [*drop, *spec.uninstall]))
    return found


def _build(environment: EngineEnvironment) -> Path:
    folder, began = environment.folder, time.monotonic()
    keep = environment.facts().get("venv")
    venv = folder / f"venv-{uuid4().hex[:8]}"
    for left in entries_in(folder):
        if left.name.startswith(("venv-", "projects-")) and left.name != keep:
            remove_folder(left)
    # Building a project writes into its folder, and those of an installed engine are not ours to write to.
    projects = folder / f"projects-{uuid4().hex[:8]}"
    for project in environment.spec.local_projects:
        shutil.copytree(project, projects / project.name)
    uv = installer()
    name = f"{environment.engine} ({environment.flavour})"
    say(f"{name}: {_size_of(environment)}, with {'uv' if uv else 'pip'}, into {folder}")
    with Shown(name, unit="B") as shown:
        indexes, variables = uv_settings() if uv else ([], {})
        env = {"PYTHONPATH": "", **variables}
        try:
            for what, command in steps(environment, venv, projects, uv, indexes):
                shown.update(f"{name}: {what}")
                _run(command, env, folder / _LOG, venv, shown, f"{name}: {what}", environment.spec.hint)
        except BaseException:
            shutil.rmtree(venv, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(projects, ignore_errors=True)
    python = venv / "bin" / "python"
    seconds, size = round(time.monotonic() - began, 1), bytes_below(venv)
    facts: dict[str, Any] = {
        "engine": environment.engine,
        "flavour": environment.flavour,
        "venv": venv.name,
        "made_with": "uv" if uv else "venv and pip",
        "seconds": seconds,
        "bytes": size,
        "versions": _versions(environment, python),
    }
    write_json_atomically(environment.marker, facts)
    if keep:
        shutil.rmtree(folder / keep, ignore_errors=True)
    say(f"{name}: installed in {seconds:.0f} s, {size / 1e9:.1f} GB")
    return python


def _size_of(environment: EngineEnvironment) -> str:
    """What it takes on the disk and what is free there, in words."""
    needed, free = environment.spec.disk_bytes, shutil.disk_usage(environment.folder).free
    if needed is None:
        return f"{free / 1e9:.1f} GB are free"
    words = f"takes about {needed / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free"
    # An installer that links to its own cache may take less, so it is tried.
    advice = f" (perhaps too little: make room, or set {CACHE_VARIABLE} to a folder on another disk)"
    return words + (advice if free < needed else "")


def _versions(environment: EngineEnvironment, python: Path) -> dict[str, str]:
    log = environment.folder / "versions.log"
    log.unlink(missing_ok=True)
    child = spawn_tethered([str(python), "-I", "-c", _VERSIONS], log_file=log, stop_timeout_s=2.0)
    try:
        child.wait(120.0)
        found = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    finally:
        child.stop()
    return {name: found[name] for name in environment.environment.shown if name in found}


def _run(
    command: Sequence[str], env: Mapping[str, str], log: Path, venv: Path, shown: Shown, what: str, hint: str
) -> None:
    # Tethered: when this process is killed, so is the installer, and nothing goes on writing.
    child = spawn_tethered(command, env, log_file=log, stop_timeout_s=2.0)
    deadline = time.monotonic() + INSTALL_LIMIT_S
    measured = 0.0
    try:
        while (code := child.poll()) is None and time.monotonic() < deadline:
            line = last_lines(log, count=1)
            shown.update(note="" if line.startswith("---") else line.strip()[-80:])
            if time.monotonic() - measured > _MEASURE_EVERY_S:
                shown.update(done=bytes_below(venv))
                measured = time.monotonic()
            time.sleep(_LOOK_EVERY_S)
    finally:
        child.stop()
    if code == 0:
        return
    reason = f"wasn't done after {INSTALL_LIMIT_S:g} s" if code is None else f"failed with exit code {code}"
    raise ProcessFailed(
        f"{what}: {reason}. Nothing was left half-made; run it again once the cause is mended."
        f"{' ' + hint if hint else ''} The end of {log}:\n{last_lines(log)}"
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        with held(Path(f"{folder}.lock"), limit_s=INSTALL_LIMIT_S, what=f"is at work in {folder}"):
            yield
    except TimeoutError as error:
        raise ProcessFailed(str(error)) from error
