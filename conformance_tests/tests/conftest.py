"""What the mutants of backends share: a run of both suites of a backend, within this process, on what a test gives.

Knows neither what is wrong with a backend nor which check must notice it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

SUITES = """
import pytest
from art_conformance import BackendConformance, PublicationConformance

class Given:
    @pytest.fixture(scope="class")
    @classmethod
    def open_backend(cls, request):
        return request.config.given.open_backend

    @pytest.fixture(scope="class")
    @classmethod
    def transport(cls, request):
        return request.config.given.transport

class TestPublication(Given, PublicationConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def inference_command(cls, request):
        return request.config.given.inference_command

class TestBackend(Given, BackendConformance):
    pass
"""
NotMet = Callable[..., dict[str, str]]


@dataclass
class Given:
    """A plugin of pytest that has what the suites ask for."""

    open_backend: Callable[[Path], Any]
    transport: Any = None
    inference_command: tuple[str, ...] = ()

    def pytest_configure(self, config: Any) -> None:
        config.given = self


@pytest.fixture
def not_met(tmp_path: Path, own_tiny_model: Path) -> NotMet:
    """Run every check of both suites, or one by its name, and give the ids that aren't met, each with what was said.

    Not by pytester, which forgets what was imported meanwhile: torch can't be imported twice.
    """

    def run(open_backend: Callable[[Path], Any], *, only: str = "", **given: Any) -> dict[str, str]:
        folder = Path(mkdtemp(dir=tmp_path))
        suites, report = folder / "test_suites.py", folder / "report.json"
        suites.write_text(SUITES, encoding="utf-8")
        options = [
            f"--rootdir={folder}",
            f"--basetemp={folder / 'run'}",
            "-c",
            "/dev/null",
            "--tb=no",
            "-q",
            "--import-mode=importlib",
        ]
        options += [f"--conformance-model={own_tiny_model}", f"--conformance-report={report}"]
        # A process has one alarm and one handler of crashes, which are the outer run's.
        options += [word for name in ("timeout", "faulthandler", "cacheprovider") for word in ("-p", f"no:{name}")]
        options += ["-o", "asyncio_default_fixture_loop_scope=function", "-W", "ignore::RuntimeWarning"]
        pytest.main([*options, *(["-k", only] if only else []), str(suites)], plugins=[Given(open_backend, **given)])
        checks = [entry for suite in json.loads(report.read_text(encoding="utf-8")) for entry in suite["checks"]]
        assert only or not [entry["id"] for entry in checks if entry["outcome"] == "not run"]
        return {entry["id"]: entry["detail"] for entry in checks if entry["outcome"] == "NOT MET"}

    return run


@pytest.fixture
def not_met_by_reference(not_met: NotMet) -> NotMet:
    """The same of a kind of reference backend, without the check that needs a server to kill."""
    from art_conformance.reference_backend import transport_to

    def run(kind: Callable[[Path], Any], **settings: Any) -> dict[str, str]:
        opened: list[Any] = []

        def open_backend(folder: Path) -> Any:
            opened.append(kind(folder))
            return opened[-1]

        found = not_met(open_backend, transport=transport_to(opened), **settings)
        if not settings.get("only"):
            assert "inference_command" in found.pop("PUB-020")
        return found

    return run
