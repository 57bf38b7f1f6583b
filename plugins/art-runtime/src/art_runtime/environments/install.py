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
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from art_core.atomic_files import write_json_atomically
from art_core.errors import ProcessFailed

from ..spawning import last_lines, spawn_tethered
from .indexes import uv_settings
from .places import EngineEnvironment, engine_folder

INSTALL_LIMIT_S: Final = 3600.0
_LOG: Final = "install.log"
_VERSIONS: Final = (
    "import json; from importlib.metadata import distributions;"
    " print(json.dumps({d.name: d.version for d in distributions()}))"
)


def install(environment: EngineEnvironment, *, again: bool = False, console: Console | None = None) -> Path:
    """Install an environment unless it is there, and give its interpreter. `again` makes it anew.

    Another process that is at it already is waited for. Shows progress on stderr. Raises ProcessFailed with the end of
    the log when a step fails; an environment that was there before stays.
    """
    found = environment.python()
    if found is not None and not again:
        return found
    environment.folder.mkdir(parents=True, exist_ok=True)
    console = console or Console(stderr=True)
    with _locked(environment.folder, console):
        found = environment.python()
        if found is not None and not again:
            return found
        return _build(environment, console)


def remove(engine: str, flavour: str | None = None) -> list[Path]:
    """Remove an engine's environments (all flavours, or one), those of older requirements too; says which."""
    removed = []
    root = engine_folder(engine)
    for folder in sorted(root.glob(f"{flavour or '*'}-*")) if root.is_dir() else ():
        if not folder.is_dir():
            continue
        with _locked(folder, Console(stderr=True)):
            # Without its marker it counts as missing at once, however long the rest takes.
            for marker in folder.glob("*.json"):
                marker.unlink()
            shutil.rmtree(folder)
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


def _build(environment: EngineEnvironment, console: Console) -> Path:
    folder, began = environment.folder, time.monotonic()
    keep = environment.facts().get("venv")
    venv = folder / f"venv-{uuid4().hex[:8]}"
    for left in [*folder.glob("venv-*"), *folder.glob("projects-*")]:
        if left.name != keep:
            shutil.rmtree(left)
    # Building a project writes into its folder, and those of an installed engine are not ours to write to.
    projects = folder / f"projects-{uuid4().hex[:8]}"
    for project in environment.spec.local_projects:
        shutil.copytree(project, projects / project.name)
    uv = installer()
    name = f"{environment.engine} ({environment.flavour})"
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    ) as progress:
        task = progress.add_task(name, total=None)
        indexes, variables = uv_settings() if uv else ([], {})
        env = {"PYTHONPATH": "", **variables}
        try:
            for what, command in steps(environment, venv, projects, uv, indexes):
                console.print(f"{name}: {what} …", highlight=False)
                _run(command, env, folder / _LOG, f"{name}: {what}", progress, task, environment.spec.hint)
        except BaseException:
            shutil.rmtree(venv, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(projects, ignore_errors=True)
    python = venv / "bin" / "python"
    seconds, size = round(time.monotonic() - began, 1), _bytes_in(venv)
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
    console.print(f"{name}: installed in {seconds:.0f} s, {size / 1e9:.1f} GB, {folder}", highlight=False)
    return python


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
    command: Sequence[str],
    env: Mapping[str, str],
    log: Path,
    what: str,
    progress: Progress,
    task: TaskID,
    hint: str,
) -> None:
    # Tethered: when this process is killed, so is the installer, and nothing goes on writing.
    child = spawn_tethered(command, env, log_file=log, stop_timeout_s=2.0)
    deadline = time.monotonic() + INSTALL_LIMIT_S
    try:
        while (code := child.poll()) is None and time.monotonic() < deadline:
            line = last_lines(log, count=1)
            said = "" if line.startswith("---") else escape(line.strip()[-80:])
            progress.update(task, description=f"{what}  [dim]{said}[/]")
            time.sleep(0.2)
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
def _locked(folder: Path, console: Console) -> Iterator[None]:
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"Another process is at work in {folder}; waiting for it …", highlight=False)
        try:
            lock.acquire(timeout=INSTALL_LIMIT_S)
        except Timeout:
            raise ProcessFailed(
                f"another process has held {folder}.lock for {INSTALL_LIMIT_S:g} s. Wait for it, or end it and try"
                " again."
            ) from None
    try:
        yield
    finally:
        lock.release()


def _bytes_in(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
