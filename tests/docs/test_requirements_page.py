"""The page of requirements is what the suites say, every one of them on a row of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from art_conformance import catalogue
from art_conformance.requirements import Level, Requirement
from art_core import BackendCapability

SCRIPT = Path(__file__).with_name("requirements_page.py")
PAGE = Path(__file__).parents[2] / "docs" / "requirements.md"


@pytest.fixture(scope="module")
def script(module_of: Callable[[Path], Any]) -> Any:
    """The module that makes the page, which is a script beside this one."""
    return module_of(SCRIPT)


def test_the_page_of_requirements_is_what_the_suites_say() -> None:
    command = [sys.executable, str(SCRIPT), "--check"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert made.returncode == 0, made.stderr


def test_every_requirement_has_one_row_under_its_suite() -> None:
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        suite = section.partition("\n")[0].strip("`")
        expected = [requirement.id for requirement in catalogue.requirements_of(suite)]
        assert re.findall(r"^\| ([A-Z]{3}-\d{3}) \|", section, re.MULTILINE) == expected
    assert PAGE.read_text(encoding="utf-8").count("\n## ") == len(catalogue.SUITES)


def test_a_row_has_all_that_a_requirement_says(script: Any) -> None:
    told = Requirement(id="ABC-001", level=Level.SHOULD, text="A | B is kept.", needs=BackendCapability.FORK, live=True)
    assert script.row(told) == "| ABC-001 | SHOULD | A \\| B is kept. | `fork` | yes |"
    plain = Requirement(id="ABC-002", level=Level.MUST, text="C is kept.")
    assert script.row(plain) == "| ABC-002 | MUST | C is kept. |  |  |"


def test_a_requirement_that_is_new_makes_another_page(script: Any) -> None:
    plain = Requirement(id="ABC-002", level=Level.MUST, text="C is kept.")
    suites = {"TrackerConformance": [plain]}
    more = {"TrackerConformance": [plain, Requirement(id="ABC-003", level=Level.MUST, text="D too.")]}
    assert script.page_of(suites, 3) != script.page_of(more, 3)
    assert "revision 4: 2 requirements" in script.page_of(more, 4)
