"""The workflows of the foreign engines, run as their CI would: each step in order, in a new environment with the wheels
and the project alone. Knows how a workflow is written, and nothing of what its steps do. `test_foreign_engines`
holds the same engines in `make test`.
"""

from __future__ import annotations

import os
import shutil
import venv
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECTS = sorted((ROOT / "examples" / "foreign_engines").iterdir())


def steps(project: Path) -> list[str]:
    """What a project's workflow runs; what it uses of others is GitHub's."""
    workflow = yaml.safe_load((project / ".github" / "workflows" / "conformance.yml").read_text(encoding="utf-8"))
    return [step["run"] for step in workflow["jobs"]["conformance"]["steps"] if "run" in step]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("project", [pytest.param(project, id=project.name) for project in PROJECTS])
def test_a_foreign_engine_s_own_workflow_passes(
    project: Path, wheels: Path, environment_for: Any, tmp_path: Path
) -> None:
    fresh = environment_for(tmp_path / "environment", wheels)
    venv.create(fresh.folder, with_pip=True)
    checkout = shutil.copytree(project, tmp_path / "checkout")
    # Ours are not on the index; what they need is, in the versions of `make setup`.
    found = f"{os.environ.get('PIP_FIND_LINKS', '')} {wheels}".strip()
    settings = (f"PIP_FIND_LINKS={found}", f"PIP_CONSTRAINT={ROOT / 'constraints.txt'}")
    for step in steps(project):
        ran = fresh.run("env", *settings, "bash", "-e", "-c", step, cwd=checkout, timeout=900)
        assert ran.returncode == 0, f"{step}\n{ran.stdout[-6000:]}{ran.stderr[-2000:]}"
    assert (checkout / "conformance.json").exists(), "what the workflow uploads"
