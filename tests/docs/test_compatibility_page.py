"""What is deprecated says so in one way, stands on the page on compatibility, and goes when its version comes.

Reads the source of every distribution here; knows nothing of what each deprecated thing is.
"""

from __future__ import annotations

import ast
import linecache
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.version import Version

from art.deprecation import deprecated
from art_conformance import catalogue

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
PACKAGES = ("art", "art_core", "engines/*/src", "plugins/*/src", "conformance_tests/src")
SPEAKS = "art/deprecation.py"
OTHER_WAYS = {"DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"}


@dataclass(frozen=True)
class Deprecation:
    """A call of `deprecated`, as it stands in the source."""

    what: str
    removed_in: str


def sources() -> dict[str, ast.Module]:
    """Every module of every package, by its path."""
    files = [file for pattern in PACKAGES for folder in ROOT.glob(pattern) for file in folder.rglob("*.py")]
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def other_ways(tree: ast.AST) -> Iterator[str]:
    """How else a module says that something is deprecated: by a warning's class, or by PEP 702."""
    for node in ast.walk(tree):
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        if name in OTHER_WAYS:
            yield name
        if isinstance(node, ast.ImportFrom) and node.module in ("warnings", "typing_extensions"):
            yield from (each.name for each in node.names if each.name in ("deprecated", *OTHER_WAYS))


def deprecations(tree: ast.AST) -> Iterator[Deprecation]:
    """Raises ValueError for a call whose arguments are not written out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "deprecated":
            named = {each.arg: each.value for each in node.keywords}
            yield Deprecation(*(ast.literal_eval(each) for each in (*node.args, named["removed_in"])))


def has_come(deprecation: Deprecation, version: str) -> bool:
    return Version(version).release >= Version(deprecation.removed_in).release


@pytest.fixture(scope="module")
def found() -> list[Deprecation]:
    return [each for path, tree in sources().items() if path != SPEAKS for each in deprecations(tree)]


def test_whatever_is_deprecated_says_so_in_one_way() -> None:
    read = sources()
    assert set(other_ways(read[SPEAKS])) == {"DeprecationWarning"}
    assert {path: ways for path, tree in read.items() if path != SPEAKS and (ways := [*other_ways(tree)])} == {}


@pytest.mark.parametrize(
    "written",
    [
        "warnings.warn('x', DeprecationWarning)",
        "warnings.warn('x', category=builtins.PendingDeprecationWarning)",
        "from typing_extensions import deprecated",
        "from warnings import deprecated as old",
    ],
)
def test_the_search_for_other_ways_finds_one(written: str) -> None:
    assert len([*other_ways(ast.parse(written))]) == 1


def test_whoever_calls_what_is_deprecated_is_told_when_it_goes_and_what_to_do() -> None:
    def old() -> None:
        deprecated("old()", instead="Call new().", removed_in="1.0")

    with pytest.warns(
        DeprecationWarning, match=r"^old\(\) is deprecated and goes in art-core 1\.0\. Call new\(\)\.$"
    ) as told:
        old()
    assert told[0].filename == __file__
    assert linecache.getline(__file__, told[0].lineno).strip() == "old()"


def test_what_is_deprecated_is_on_the_page(found: list[Deprecation]) -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index("| deprecated | goes in art-core | instead |") + 2
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[start : lines.index("", start)]]
    assert sorted((what.strip("`"), version) for what, version, _ in rows) == sorted(
        (each.what, each.removed_in) for each in found
    )
    assert all(instead for *_, instead in rows)


def test_what_was_to_go_with_this_version_is_gone(found: list[Deprecation]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == "art-core"
    assert [each for each in found if has_come(each, project["version"])] == []


def test_a_version_that_has_come_is_noticed() -> None:
    (each,) = deprecations(ast.parse('deprecation.deprecated("a", instead=B, removed_in="0.3")'))
    assert each == Deprecation("a", "0.3")
    assert [version for version in ("0.2.9", "0.3.0", "0.10.0", "1.0") if has_come(each, version)] == [
        "0.3.0", "0.10.0", "1.0",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="malformed"):
        list(deprecations(ast.parse('deprecated("a", instead=B, removed_in=SOON)')))


def test_the_page_says_which_revision_of_the_requirements_is_in_force() -> None:
    assert f"a revision, now {catalogue.REVISION};" in PAGE.read_text(encoding="utf-8")
