"""What holds across the whole repository, read from the source without running it: which way imports go, what is
declared, and what no file may contain.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from grimp import build_graph
from packaging.requirements import Requirement

from art_core import installed_plugins

ROOT = Path(__file__).parents[2]
PROJECTS = [
    ROOT,
    *sorted(p.parent for pattern in ("engines/*", "plugins/*") for p in ROOT.glob(f"{pattern}/pyproject.toml")),
    ROOT / "conformance_tests",
]
# What an import of these distributions' modules may reach among ours, beside itself; everything may reach art_core.
ALLOWED = {
    "art_core": set[str](),
    "art": set[str](),
    "art_engine_kit": set[str](),
    "art_training_kit": {"art_engine_kit"},
    "art_engine": {"art_engine_kit", "art_training_kit"},
    "art_runtime": {"art_engine_kit"},
    "art_gateway": set[str](),
    "art_tracker": set[str](),
    "art_backend": {"art_engine_kit", "art_runtime", "art_gateway", "art_tracker_files"},
    "art_backend_serverless": set[str](),
    "art_serve": {"art_backend_serverless", "art_runtime", "art_gateway"},
    "art_trackio": {"art_tracker_kit"},
    "art_wandb": {"art_tracker_kit"},
    "art_mlflow": {"art_tracker_kit"},
    "art_conformance": {"art_engine_kit", "art_runtime"},
}
# The `art` command is the client's; the kernel's part is to look whose package `art` is before that is imported.
IMPORTS_MORE = {ROOT / "art_core" / "__main__.py": {"art"}}
# What `isinstance` may not be asked about, and whose name may not be compared.
PROTOCOLS = {"InferenceEngine", "TrainingEngine", "Backend", "Publisher", "Policy"}
PLUGIN = re.compile(r"\b\w*(engine|backend|plugin|tracker|publisher)\w*\b", re.IGNORECASE)
# Projects of their own, which `test_third_party` makes and checks.
TEMPLATES = ROOT / "art" / "plugin_templates"


@cache
def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def python_files() -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".py" and TEMPLATES not in path.parents]


def modules_of(package: Path) -> list[Path]:
    """Its Python files, less those that it writes out for others."""
    return [path for path in package.rglob("*.py") if TEMPLATES not in path.parents]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def optional(path: Path) -> set[ast.AST]:
    """What stands in a `try` that is ready for an ImportError."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h.type) for h in node.handlers if h.type):
            found.update(inner for line in node.body for inner in ast.walk(line))
    return found


def imported(path: Path, *, without: Collection[ast.AST] = ()) -> Iterator[str]:
    """The top-level names that a module imports, wherever in it; relative imports are its own package."""
    for node in ast.walk(tree_of(path)):
        if node in without:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def packages_of(project: Path) -> list[Path]:
    declared = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    return [project / name for name in declared["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]


def sources() -> list[Any]:
    return [pytest.param(package, id=package.name) for project in PROJECTS for package in packages_of(project)]


def is_ours(name: str) -> bool:
    return name == "art" or name.startswith("art_")


@pytest.mark.parametrize("package", sources())
def test_arrows_go_one_way(package: Path) -> None:
    kind = max((prefix for prefix in ALLOWED if package.name.startswith(prefix)), key=len)
    allowed = ALLOWED[kind] | {package.name, "art_core"}
    # Files that run in the engine's own environment lie beside each other there, outside of any package.
    allowed |= {file.stem for file in package.rglob("in_environment/*.py")}
    files = modules_of(package)
    assert files
    for file in files:
        beyond = {name for name in imported(file) if is_ours(name)} - allowed - IMPORTS_MORE.get(file, set())
        assert not beyond, f"{file.relative_to(ROOT)} imports {', '.join(sorted(beyond))}"


@pytest.mark.parametrize("package", sources())
def test_nothing_names_the_modules_of_an_engine_but_itself(package: Path) -> None:
    if package.name.startswith("art_engine"):
        return
    for file in modules_of(package):
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "art_engine_" not in node.value.replace("art_engine_kit", ""), (
                    f"{file.relative_to(ROOT)}:{node.lineno} names an engine's module"
                )


@pytest.mark.parametrize("project", [pytest.param(project, id=project.name) for project in PROJECTS])
def test_what_is_imported_is_declared(project: Path) -> None:
    declared = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for lines in declared.get("optional-dependencies", {}).values() for line in lines]
    requirements = [Requirement(line) for line in (*declared["dependencies"], *extras)]
    known = {normal(r.name) for r in requirements} | {normal(declared["name"])}
    if "pydantic" in known:
        known.add("pydantic-core")  # pinned by pydantic to the very version, and the place of some of its functions
    # An extra brings its own requirements along, such as aiohttp with openai[aiohttp].
    for requirement in requirements:
        for line in metadata.requires(requirement.name) or [] if requirement.extras else []:
            inner = Requirement(line)
            if inner.marker and any(inner.marker.evaluate({"extra": extra}) for extra in requirement.extras):
                known.add(normal(inner.name))
    providers = metadata.packages_distributions()
    for package in packages_of(project):
        own = {p.name for p in packages_of(project)}
        for file in modules_of(package):
            if "in_environment" in file.parts:
                continue  # runs in the engine's own environment, which its EnvironmentSpec describes
            for name in imported(file, without=optional(file)):
                if name in sys.stdlib_module_names or name in own or name == "__future__":
                    continue
                candidates = {normal(dist) for dist in providers.get(name, [name])}
                assert candidates & known, (
                    f"{file.relative_to(ROOT)} imports {name}, which pyproject.toml doesn't declare"
                )


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def asks_who_a_plugin_is(tree: ast.AST, names: Collection[str]) -> Iterator[ast.AST]:
    """Calls that look at the class or the attributes of an engine, a backend or a plugin, and comparisons of its name
    with one of `names`.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kinds]):
                if PROTOCOLS.intersection(re.findall(r"\w+", ast.unparse(kinds))):
                    yield node
            case ast.Call(func=ast.Name(id="hasattr"), args=[subject, _]) if PLUGIN.search(ast.unparse(subject)):
                yield node
            case ast.Compare():
                sides = [node.left, *node.comparators]
                words = {each.value for side in sides for each in ast.walk(side) if isinstance(each, ast.Constant)}
                asked = [ast.unparse(side) for side in sides if not isinstance(side, ast.Constant)]
                if words & set(names) and any(PLUGIN.search(each) for each in asked):
                    yield node


def test_what_a_plugin_can_do_is_never_asked_of_its_class_or_its_name() -> None:
    names = {info.name for info in installed_plugins().infos}
    assert {"torch", "vllm", "local", "serverless"} <= names
    for package in (package for project in PROJECTS[:-1] for package in packages_of(project)):
        for file in modules_of(package):
            for node in asks_who_a_plugin_is(tree_of(file), names):
                raise AssertionError(f"{file.relative_to(ROOT)}: {ast.unparse(node)}")


@pytest.mark.parametrize(
    "asked",
    [
        "isinstance(self.backend, art_core.Backend)",
        "hasattr(engine, 'sleep')",
        "spec.engine == 'vllm'",
        "backend.name in ('local', 'other')",
    ],
)
def test_the_search_for_such_questions_finds_one(asked: str) -> None:
    assert list(asks_who_a_plugin_is(ast.parse(asked), {"vllm", "local"}))


def test_within_the_distributions_too_arrows_go_one_way() -> None:
    """The contracts in pyproject.toml: no circles, and the wings of the larger distributions."""
    # In a process of its own: it turns off the loggers of the one that it runs in.
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    kept = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert kept.returncode == 0, kept.stdout + kept.stderr


def test_every_package_is_looked_at_for_circles() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    [circles] = [contract for contract in contracts["contracts"] if contract["id"] == "circles"]
    packages = {package.name for project in PROJECTS for package in packages_of(project)}
    assert set(contracts["root_packages"]) == set(circles["ancestors"]) == packages


def test_no_module_imports_a_package_that_holds_it() -> None:
    graph = build_graph(*(package.name for project in PROJECTS for package in packages_of(project)), cache_dir=None)
    for module in graph.modules:
        above = {other for other in graph.find_modules_directly_imported_by(module) if module.startswith(f"{other}.")}
        assert not above, f"{module} imports {', '.join(above)}, which is made of it"


@pytest.mark.slow
def test_no_exception_is_passed_over() -> None:
    for file in python_files():
        for node in ast.walk(tree_of(file)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            says_nothing = all(
                isinstance(line, ast.Pass) or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
                for line in node.body
            )
            assert not says_nothing, f"{file.relative_to(ROOT)}:{node.lineno} passes an exception over"
            assert node.type is not None, f"{file.relative_to(ROOT)}:{node.lineno} catches everything, Ctrl-C included"


def test_packages_read_and_write_text_as_utf8() -> None:
    # ruff finds only those calls of which it knows that they are a path's.
    for project in PROJECTS:
        for package in packages_of(project):
            for file in modules_of(package):
                for node in ast.walk(tree_of(file)):
                    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                        named = {keyword.arg for keyword in node.keywords}
                        text = node.func.attr in ("read_text", "write_text")
                        assert not text or "encoding" in named, f"{file.relative_to(ROOT)}:{node.lineno}: no encoding"


MACHINE_PATH = re.compile(r"""(?<![\w.}/])/(?:work|root|home|Users|mnt|opt/(?:wheels|pypi))/[\w.]""")


def test_no_file_holds_a_path_of_a_machine() -> None:
    for file in tracked_files():
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, 1):
            assert not MACHINE_PATH.search(line), f"{file.relative_to(ROOT)}:{number}: {line.strip()}"


def test_the_search_for_machine_paths_finds_one() -> None:
    for path in ("home/someone/x", "root/.cache", "work/main"):
        assert MACHINE_PATH.search(f'open("/{path}")')


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "misc", "manager"])
def test_no_module_has_a_name_that_says_nothing(name: str) -> None:
    assert not [file for file in python_files() if file.stem in (name, f"_{name}")]


def test_every_module_says_what_it_is() -> None:
    for project in PROJECTS:
        for package in packages_of(project):
            for file in modules_of(package):
                source = file.read_text(encoding="utf-8").strip()
                if source:
                    assert ast.get_docstring(tree_of(file)), f"{file.relative_to(ROOT)} has no docstring"


def test_test_files_have_names_of_their_own() -> None:
    names = [file.name for file in python_files() if file.name.startswith("test_")]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)
