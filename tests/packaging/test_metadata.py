"""What every distribution says of itself: a name, a version, floors under its dependencies, a README, the licence."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECTS = [
    ROOT,
    *sorted(p.parent for pattern in ("engines/*", "plugins/*") for p in ROOT.glob(f"{pattern}/pyproject.toml")),
    ROOT / "conformance_tests",
]
ALL = pytest.mark.parametrize("project", [pytest.param(p, id="root" if p == ROOT else p.name) for p in PROJECTS])
# A dependency without which the first paragraph of design would be untrue, and what it is for.
NEEDS = {
    "art-engine-torch": {"art-training-kit", "torch", "transformers", "peft", "safetensors"},
    "art-backend-local": {"art-runtime", "art-gateway", "art-tracker-files"},
}


def read(project: Path) -> dict[str, Any]:
    return tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(project: Path) -> list[Requirement]:
    declared = read(project)["project"]
    extras = [line for lines in declared.get("optional-dependencies", {}).values() for line in lines]
    return [Requirement(line) for line in (*declared["dependencies"], *extras)]


@ALL
def test_a_distribution_names_itself(project: Path) -> None:
    declared = read(project)["project"]
    expected = {"conformance_tests": "art-conformance"}
    assert declared["name"] == ("art-core" if project == ROOT else expected.get(project.name, project.name))
    assert Version(declared["version"]).release >= (0, 1)
    assert declared["license"] == "Apache-2.0"
    assert declared["requires-python"] == ">=3.11"
    assert len(declared["description"]) > 20
    readme = (project / declared["readme"]).read_text(encoding="utf-8")
    assert len(readme.splitlines()) >= 3, "the README says next to nothing"
    assert declared["name"] in readme


@ALL
def test_every_dependency_has_a_floor(project: Path) -> None:
    for requirement in requirements(project):
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators & {">=", "==", "~="}, f"{requirement} has no floor: a resolver may pick any old version"
    for line in read(project)["build-system"]["requires"]:
        assert ">=" in line, f"the build requirement {line} has no floor"


@ALL
def test_ours_have_a_floor_and_a_ceiling(project: Path) -> None:
    own = read(project)["project"]["name"]
    ours = [r for r in requirements(project) if r.name.startswith("art-") and r.name != own]
    if own != "art-core":
        assert "art-core" in {r.name for r in ours}
    for requirement in ours:
        operators = {specifier.operator for specifier in requirement.specifier}
        assert {">=", "<"} <= operators, f"{requirement} needs a floor and a ceiling"
        sibling = next(read(p)["project"] for p in PROJECTS if read(p)["project"]["name"] == requirement.name)
        assert requirement.specifier.contains(sibling["version"]), (
            f"{requirement} leaves out the one in this repository"
        )


@ALL
def test_what_a_distribution_cannot_do_without_is_required(project: Path) -> None:
    declared = read(project)["project"]
    names = {Requirement(line).name for line in declared["dependencies"]}
    assert NEEDS.get(declared["name"], set()) <= names


@ALL
def test_packages_are_typed_and_named_after_their_distribution(project: Path) -> None:
    declared = read(project)
    packages = declared["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    import_name = declared["project"]["name"].replace("-", "_")
    assert packages == (["art_core", "art"] if project == ROOT else [f"src/{import_name}"])
    for package in packages:
        assert (project / package / "__init__.py").is_file()
        assert (project / package / "py.typed").is_file()


@ALL
def test_plugins_of_the_group_art_exist(project: Path) -> None:
    for name, target in read(project)["project"].get("entry-points", {}).get("art", {}).items():
        assert re.fullmatch(r"[a-z][a-z0-9-]*", name)
        module = project / "src" / (target.replace(".", "/") + ".py")
        package = project / "src" / target.replace(".", "/") / "__init__.py"
        assert module.is_file() or package.is_file()


@pytest.mark.parametrize("engine", ["vllm", "sglang", "torchtune", "unsloth"])
def test_an_engine_with_an_environment_of_its_own_brings_the_client_none_of_its_libraries(engine: str) -> None:
    brought, waiting = set[str](), [f"art-engine-{engine}"]
    while waiting:
        project = next(each for each in PROJECTS if read(each)["project"]["name"] == waiting[0])
        brought.add(waiting.pop(0))
        names = {Requirement(line).name for line in read(project)["project"]["dependencies"]}
        waiting += [name for name in names - brought if name.startswith("art-") and name not in waiting]
        brought |= {name for name in names if not name.startswith("art-")}
    assert "art-engine-kit" in brought
    assert not brought & {"torch", "transformers", "peft", "vllm", "sglang", "torchtune", "torchao", "unsloth", "trl"}


def test_the_core_is_light() -> None:
    names = {r.name for r in requirements(ROOT)}
    assert not names & {"torch", "transformers", "peft", "numpy", "vllm", "sglang"}


def test_the_licence_is_there() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")[:400]


def test_every_distribution_is_in_the_workspace() -> None:
    workspace = read(ROOT)["tool"]["uv"]["workspace"]["members"]
    members = {path for pattern in workspace for path in ROOT.glob(pattern) if (path / "pyproject.toml").is_file()}
    assert members == set(PROJECTS) - {ROOT}


def test_every_package_is_type_checked_and_its_imports_are_held() -> None:
    tools = read(ROOT)["tool"]
    wheels = [read(project)["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] for project in PROJECTS]
    packages = {Path(package).name for listed in wheels for package in listed}
    assert set(tools["mypy"]["packages"]) == packages
    assert set(tools["importlinter"]["root_packages"]) == packages
    (circles,) = [contract for contract in tools["importlinter"]["contracts"] if contract["id"] == "circles"]
    assert set(circles["ancestors"]) == packages


def test_the_pip_line_for_contributors_has_every_distribution() -> None:
    named = re.findall(r" -e (\S+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert sorted(ROOT / name for name in named) == sorted(PROJECTS)
