"""What a third party begins with, a plugin of each kind as `art plugins new` writes it: it knows only what it may, is
typed, and passes ART's suites from wheels, outside the checkout.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KINDS = {
    "inference-engine": "art-engine-mine",
    "training-engine": "art-engine-tuner",
    "tracker": "art-tracker-ledger",
    "backend": "art-backend-desk",
}
KNOWN = {
    "art-engine-mine": {"art_core", "art_engine_kit"},
    "art-engine-tuner": {"art_core", "art_engine_kit", "art_training_kit"},
    "art-tracker-ledger": {"art_core", "art_tracker_kit"},
    "art-backend-desk": {"art_core"},
}
# It has no inference server that could be killed.
UNMET = {"art-backend-desk": {"PUB-020"}}


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of each kind, in a folder of their own."""
    folder = tmp_path_factory.mktemp("third_party")
    for kind, distribution in KINDS.items():
        name = distribution.rpartition("-")[2]
        command = [sys.executable, "-m", "art_core", "plugins", "new", name, "--kind", kind]
        made = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        assert made.returncode == 0, made.stderr
        assert f"cd {distribution}" in made.stdout
    return folder


def package_of(projects: Path, name: str) -> Path:
    return projects / name / name.replace("-", "_")


@pytest.mark.parametrize("name", KNOWN)
def test_a_third_party_s_plugin_knows_only_what_it_may(projects: Path, name: str) -> None:
    imported = set()
    for file in package_of(projects, name).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    ours = {module for module in imported if re.fullmatch(r"art|art_\w+", module)}
    assert ours - {package_of(projects, name).name} == KNOWN[name]


def test_a_third_party_s_engine_is_written_in_a_hundred_lines(projects: Path) -> None:
    files = package_of(projects, "art-engine-mine").rglob("*.py")
    lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
    assert 0 < len([line for line in lines if line.strip()]) <= 100


@pytest.mark.parametrize("name", KNOWN)
def test_the_lines_that_matter_are_marked_and_few(projects: Path, name: str) -> None:
    text = "".join(file.read_text("utf-8") for file in package_of(projects, name).rglob("*.py"))
    assert 3 <= text.count("# yours") <= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_what_the_kit_writes_is_typed(projects: Path, mypy_cache: Path, name: str) -> None:
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--python-version",
        "3.11",
        "--cache-dir",
        str(mypy_cache),
        ".",
    ]
    checked = subprocess.run(command, cwd=projects / name, capture_output=True, text=True, timeout=280, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kit_writes_the_same_from_the_wheel(environment: Any, projects: Path, tmp_path: Path, kind: str) -> None:
    distribution = KINDS[kind]
    name = distribution.rpartition("-")[2]
    made = environment.run("art", "plugins", "new", name, "--kind", kind, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    written, expected = (
        {str(file.relative_to(root)): file.read_text("utf-8") for file in root.rglob("*") if file.is_file()}
        for root in (tmp_path / distribution, projects / distribution)
    )
    assert written == expected


@pytest.fixture(scope="module")
def outside(environment: Any, projects: Path) -> Any:
    """The clean environment with the suites and the plugins."""
    environment.build(*(projects / name for name in KNOWN))
    environment.install(*(f"{name}[test]" for name in KNOWN))
    return environment


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_the_loader_finds_nothing_wrong_with_it_outside_the_checkout(outside: Any, tmp_path: Path, kind: str) -> None:
    checked = outside.run("art", "plugins", "check", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    listed = json.loads(outside.run("art", "plugins", "--json", cwd=tmp_path).stdout)
    assert checked.stdout == f"{len(listed)} of {len(listed)} plugins are active.\n"
    distribution = KINDS[kind]
    name = distribution.rpartition("-")[2]
    (found,) = (plugin for plugin in listed if plugin["distribution"] == distribution)
    # A tracker is hooks alone: there is nothing to be asked for by name.
    provided = [] if kind == "tracker" else [f"{kind.replace('-', ' ')} {name}"]
    assert (found["name"], found["provides"]) == (name, provided)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", KNOWN)
def test_a_third_party_s_plugin_conforms_outside_the_checkout(
    outside: Any, projects: Path, tmp_path: Path, name: str
) -> None:
    project = tmp_path / name
    # What is tested is the wheel.
    shutil.copytree(projects / name, project, ignore=shutil.ignore_patterns("art_*"))
    pytest_of_theirs = ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    ran = outside.run(*pytest_of_theirs, cwd=project, timeout=1500)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    unmet = set(re.findall(r"^  ([A-Z]+-\d+) +MUST +(?:NOT MET|known failure)", ran.stdout, re.MULTILINE))
    assert "ART conformance" in ran.stdout
    assert unmet == UNMET.get(name, set())
