"""Every distribution as a wheel, and a clean environment that is filled from them; made once a session.

By uv where it is there, as in `make setup`, and else by pip.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

from art_runtime.environments.indexes import uv_settings

ROOT = Path(__file__).parents[2]
PROJECTS = [
    ROOT,
    *sorted(p.parent for pattern in ("engines/*", "plugins/*") for p in ROOT.glob(f"{pattern}/pyproject.toml")),
    ROOT / "conformance_tests",
]
UV = Path(sys.executable).with_name("uv")


@dataclass(frozen=True)
class Environment:
    """A virtual environment into which nothing of the checkout shines, and the wheels that it may take."""

    folder: Path
    wheels: Path

    def build(self, *projects: Path) -> None:
        """Put the projects' wheels beside the others."""
        for project in projects:
            if UV.exists():
                _uv("build", "--wheel", "--out-dir", str(self.wheels), str(project))
            else:
                options = ["--quiet", "--no-deps", "--wheel-dir", str(self.wheels)]
                subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(project)], check=True, timeout=300)

    def install(self, *requirements: str) -> None:
        """Install from the wheels, and from the index what they need."""
        # Versions seen to work together, as `make setup` takes them; above all it keeps torch the CPU's.
        options = ["--find-links", str(self.wheels), "--constraint", str(ROOT / "constraints.txt"), *requirements]
        python = str(self.folder / "bin" / "python")
        if UV.exists():
            _uv("pip", "install", "--python", python, *options)
        else:
            pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, *options], check=True, timeout=1500)

    def run(self, *command: str, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command of this environment in a folder outside the checkout."""
        hidden = ("ART_", "PYTHON", "VIRTUAL_ENV")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        path = f"{self.folder / 'bin'}{os.pathsep}{kept['PATH']}"
        env = {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def _uv(*words: str) -> None:
    """Run uv, which looks where pip looks."""
    indexes, variables = _where_pip_looks()
    env = {**os.environ, **variables}
    subprocess.run([UV, *words, *indexes, "--quiet"], check=True, timeout=1500, env=env)


# Asking pip is a process of its own, and there are twenty wheels.
_where_pip_looks = functools.cache(uv_settings)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dist = tmp_path_factory.mktemp("dist")
    Environment(Path(sys.prefix), dist).build(*PROJECTS)
    return dist


@pytest.fixture(scope="session")
def environment(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A new environment with the three distributions that the README installs, and what pip finds that they need."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    made = Environment(folder, wheels)
    made.install("art-core", "art-backend-local", "art-engine-torch")
    return made


@pytest.fixture(scope="session")
def environment_for() -> type[Environment]:
    """What `environment` is, for an environment of a test's own."""
    return Environment


@pytest.fixture(scope="session")
def mypy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all that is checked, by every pytest worker, since most of the work is what they import."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "mypy"
