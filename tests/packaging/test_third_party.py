"""An inference engine, a tracker and a backend of third parties pass ART's suites from wheels, outside the checkout.

The engine is the one that `docs/writing-a-plugin.md` writes, against art_core and art_engine_kit; the tracker and the
backend are in `tests/third_party` and know art_core alone.
"""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
THIRD_PARTY = ROOT / "tests" / "third_party"
OURS = re.compile(r"art|art_(?!engine_mine|tracker_acme|backend_acme)\w+")
KNOWN = {
    "art-engine-mine": {"art_core", "art_engine_kit"},
    "art-tracker-acme": {"art_core"},
    "art-backend-acme": {"art_core"},
}
# It has no inference server that could be killed.
UNMET = {"art-backend-acme": {"PUB-020"}}
FILE = re.compile(r"^```\w+ file=(art-engine-mine/\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three projects, in a folder of their own."""
    folder = tmp_path_factory.mktemp("third_party")
    shutil.copytree(
        THIRD_PARTY, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "conftest.py")
    )
    for name, text in FILE.findall((ROOT / "docs" / "writing-a-plugin.md").read_text(encoding="utf-8")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def sources_of(projects: Path, name: str) -> list[Path]:
    return sorted((projects / name / name.replace("-", "_")).rglob("*.py"))


@pytest.mark.parametrize("name", KNOWN)
def test_a_third_party_s_plugin_knows_only_what_it_may(projects: Path, name: str) -> None:
    imported = set()
    for file in sources_of(projects, name):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    assert {module for module in imported if OURS.fullmatch(module)} == KNOWN[name]


def test_a_third_party_s_engine_is_written_in_a_hundred_lines(projects: Path) -> None:
    lines = [line for file in sources_of(projects, "art-engine-mine") for line in file.read_text("utf-8").splitlines()]
    assert 0 < len([line for line in lines if line.strip()]) <= 100


@pytest.fixture(scope="module")
def outside(environment: Any, projects: Path) -> Any:
    """The clean environment with the suites and the three plugins."""
    environment.build(*(projects / name for name in KNOWN))
    environment.install("art-conformance[oracle]", *KNOWN)
    return environment


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", KNOWN)
def test_a_third_party_s_plugin_conforms_outside_the_checkout(
    outside: Any, projects: Path, tmp_path: Path, name: str
) -> None:
    (suite,) = (projects / name).glob("test_*.py")
    shutil.copy(suite, tmp_path)
    options = ("-q", "-p", "no:cacheprovider", "-o", "asyncio_default_fixture_loop_scope=function")
    pytest_of_theirs = ("python", "-m", "pytest", *options, "--rootdir", str(tmp_path), suite.name)
    ran = outside.run(*pytest_of_theirs, cwd=tmp_path, timeout=1500)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    unmet = set(re.findall(r"^  ([A-Z]+-\d+) +MUST +(?:NOT MET|known failure)", ran.stdout, re.MULTILINE))
    assert "ART conformance" in ran.stdout
    assert unmet == UNMET.get(name, set())
