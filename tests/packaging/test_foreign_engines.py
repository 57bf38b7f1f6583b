"""Two engines that a third party might have written: typed, knowing only what they may, and held against the suite from
wheels, with their real servers. One conforms, one is told apart, and the page says of both what was found.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from art_conformance.matrix import CellReport, CellVerdict

ROOT = Path(__file__).parents[2]
PROJECTS = ROOT / "examples" / "foreign_engines"
SCRIPT = Path(__file__).with_name("foreign_engines.py")
NAMES = ("llamacpp", "transformers")


@pytest.fixture(scope="module")
def pages(module_of: Callable[[Path], Any]) -> Any:
    """The module that makes the page, which is a script beside this one."""
    return module_of(SCRIPT)


def package_of(name: str) -> Path:
    return PROJECTS / f"art-engine-{name}" / f"art_engine_{name}"


def test_there_are_no_other_engines_than_those_that_are_held() -> None:
    assert sorted(project.name for project in PROJECTS.iterdir()) == [f"art-engine-{name}" for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_engine_knows_only_the_kernel_and_the_kit(name: str) -> None:
    imported = set()
    for file in package_of(name).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    beside = {file.stem for file in package_of(name).glob("in_environment/*.py")}
    ours = {module for module in imported if re.fullmatch(r"art|art_\w+", module)}
    assert ours - beside == {"art_core", "art_engine_kit"}


def test_the_page_is_what_the_reports_give(pages: Any) -> None:
    made = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=120, check=False
    )
    assert made.returncode == 0, made.stderr
    assert [report.cell for report in pages.kept()] == [f"inference-{name}" for name in NAMES]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_engine_is_typed(name: str, mypy_cache: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--python-version", "3.11", "--cache-dir", str(mypy_cache), "."]
    project = package_of(name).parent
    checked = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=280, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.fixture(scope="module")
def outside(environment: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The clean environment with the suite and both engines; what they need themselves is made where it is missing."""
    # Building writes into the project.
    copies = tmp_path_factory.mktemp("projects")
    built = [shutil.copytree(package_of(name).parent, copies / name) for name in NAMES]
    environment.build(*built)
    environment.install("art-conformance[oracle]", *(f"art-engine-{name}" for name in NAMES))
    return environment


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "verdict"), [("llamacpp", CellVerdict.CONFORMANT), ("transformers", CellVerdict.NOT_CONFORMANT)]
)
def test_a_foreign_engine_is_what_the_page_says(
    outside: Any, pages: Any, tmp_path: Path, name: str, verdict: CellVerdict
) -> None:
    installed = outside.run("art", "engines", "install", name, "--flavour", "cpu", cwd=tmp_path, timeout=900)
    assert installed.returncode == 0, installed.stderr
    only = ("--inference-engine", name, "--only", f"inference-{name}", "--folder", "reports")
    ran = outside.run("art-conformance", "matrix", *only, cwd=tmp_path, timeout=600)
    assert ran.returncode == (0 if verdict is CellVerdict.CONFORMANT else 1), ran.stdout + ran.stderr
    file = tmp_path / "reports" / f"inference-{name}.json"
    if "ART_KEEP_REPORTS" in os.environ:
        shutil.copy(file, Path(os.environ["ART_KEEP_REPORTS"]))
    found = CellReport.model_validate_json(file.read_bytes())
    assert found.verdict is verdict, found.reason
    [said] = [report for report in pages.kept() if report.cell == found.cell]
    assert (said.verdict, said.revision) == (found.verdict, found.revision), "make foreign-engines writes the page anew"
    for of in (pages.unmet, pages.undeclared):
        assert _ids(of(said)) == _ids(of(found)), "make foreign-engines writes the page anew"


def _ids(found: list[Any]) -> list[str]:
    return [each if isinstance(each, str) else each["id"] for each in found]
