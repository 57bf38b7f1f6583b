"""How the suite itself behaves: levels, known failures, skips, undeclared capabilities, overriding, the report."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from art_conformance import MUST, SHOULD, check
from art_conformance.catalogue import REVISION, requirements
from art_conformance.requirements import checks_of
from art_conformance.serving import LiveEngine, event_lines
from art_core import InferenceLaunch, LaunchPlan
from art_core.errors import EngineRefused
from art_engine_kit import OpenAIServerEngine

pytest_plugins = ["pytester"]
# Loaded here, because a run inside this process forgets what it imported, and numpy can't be imported twice.
requirements()
# Warnings are what they are for a user, and not errors, as they are for the run that this one is within.
OPTIONS = ("-p", "no:cacheprovider", "-W", "default", "-o", "asyncio_default_fixture_loop_scope=function")


def run(pytester: pytest.Pytester, body: str, *arguments: str) -> tuple[pytest.RunResult, dict[str, Any]]:
    """Run checks on the installed plugin `torch`, changed by `body`, and give the report of its only suite."""
    pytester.makepyfile(
        "import pytest\n"
        "from art_conformance import PluginConformance\n"
        "class TestMine(PluginConformance):\n"
        "    @pytest.fixture(scope='class')\n"
        "    @classmethod\n"
        "    def plugin_name(cls):\n"
        "        return 'sound'\n"
        "    @pytest.fixture(scope='class')\n"
        "    @classmethod\n"
        "    def imported(cls):\n"  # a fresh interpreter for each test here would take its time
        "        return dict(heavy_by_module=[], heavy_by_factory=[], environment=[], folder=False, signals=False)\n"
        + body
    )
    report = pytester.path / "report.json"
    result = pytester.runpytest(*OPTIONS, f"--conformance-report={report}", *arguments)
    content = json.loads(report.read_text()) if report.exists() else []
    return result, (content[0] if content else {})


def outcome_of(report: dict[str, Any], id: str) -> str:
    return next(str(entry["outcome"]) for entry in report["checks"] if entry["id"] == id)


@pytest.fixture(autouse=True)
def sound_plugin(pytester: pytest.Pytester) -> None:
    """An installed plugin that meets every MUST and, being a single file, not the one SHOULD."""
    install_plugin(pytester, "sound", "art_api = 1\n" + HOOK)


HOOK = """
from art_core import hookimpl

@hookimpl
def art_model_registered(model):
    return None
"""


def install_plugin(
    pytester: pytest.Pytester, name: str, source: str, *, requires: str = "art-core>=0.1,<0.2", group: str = "art"
) -> None:
    """Put a plugin module and its metadata where the running interpreter finds them."""
    site = pytester.path / "site"
    metadata = site / f"{name}-0.1.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (site / f"{name}_plugin.py").write_text(source)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\nRequires-Dist: {requires}\n"
    )
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {name}_plugin\n")
    pytester.syspathinsert(site)


def test_a_should_that_is_not_met_fails_nothing_and_is_reported(pytester: pytest.Pytester) -> None:
    result, report = run(pytester, "")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=13, xfailed=1)
    assert outcome_of(report, "PLG-014") == "NOT MET"
    assert report["conformant"] is True
    result.stdout.fnmatch_lines(["*PLG-014*SHOULD*NOT MET*"])


def test_a_must_that_is_not_met_fails_the_run(pytester: pytest.Pytester) -> None:
    install_plugin(pytester, "sound", "art_api = '1'\n" + HOOK)
    result, report = run(pytester, "")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert outcome_of(report, "PLG-002") == "NOT MET"
    assert report["conformant"] is False


def test_a_known_failure_is_reported_with_its_reason_and_is_not_conformant(pytester: pytest.Pytester) -> None:
    install_plugin(pytester, "sound", "art_api = 1\n" + HOOK, requires="art-core")
    result, report = run(pytester, "    known_failures = {'PLG-007': 'no ceiling until 1.0'}\n")
    assert result.ret == pytest.ExitCode.OK
    assert outcome_of(report, "PLG-007") == "known failure"
    assert report["conformant"] is False
    result.stdout.fnmatch_lines(["*no ceiling until 1.0*"])


@pytest.mark.slow
def test_a_known_failure_that_passes_fails_the_run(pytester: pytest.Pytester) -> None:
    result, report = run(pytester, "    known_failures = {'PLG-007': 'no ceiling until 1.0'}\n")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert outcome_of(report, "PLG-007") == "NOT MET"


@pytest.mark.parametrize("known", ["{'PLG-999': 'why'}", "{'PLG-007': ' '}"])
def test_a_known_failure_needs_an_id_that_exists_and_a_reason(pytester: pytest.Pytester, known: str) -> None:
    result, _ = run(pytester, f"    known_failures = {known}\n")
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_a_check_cannot_be_replaced(pytester: pytest.Pytester) -> None:
    result, _ = run(pytester, "    def test_declares_api(self):\n        pass\n")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*overrides test_declares_api, the check of PLG-002*"])


def test_a_missing_prerequisite_is_a_failure(pytester: pytest.Pytester) -> None:
    body = "    @pytest.fixture(scope='class')\n    @classmethod\n    def info(cls):\n        pytest.skip('not here')\n"
    result, report = run(pytester, body)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert outcome_of(report, "PLG-001") == "NOT MET"


def test_what_was_not_run_does_not_count(pytester: pytest.Pytester) -> None:
    result, report = run(pytester, "", "-k", "test_declares_api")
    assert result.ret == pytest.ExitCode.OK
    assert report["conformant"] is False
    assert outcome_of(report, "PLG-001") == "not run"
    result.stdout.fnmatch_lines(["*incomplete (1 met, 13 not run)*"])


@pytest.mark.slow
def test_the_report_has_a_line_for_what_is_not_met_and_with_v_for_everything(pytester: pytest.Pytester) -> None:
    result, _ = run(pytester, "")
    lines = section(result, "ART conformance")
    assert lines[0] == f"PluginConformance rev {REVISION}, TestMine: conformant (13 met, 1 NOT MET)"
    assert [line.split()[0] for line in lines[1:-1]] == ["PLG-014", "AssertionError:"]
    result, _ = run(pytester, "", "-v")
    ids = {line.split()[0] for line in section(result, "ART conformance") if line.startswith("  PLG-")}
    assert len(ids) == 14


def test_the_reason_of_a_failure_is_printed_last(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")  # otherwise pytest shortens it to the width of a terminal
    install_plugin(pytester, "sound", "art_api = '1'\n" + HOOK)
    result, _ = run(pytester, "")
    sections = [line.strip("= ") for line in result.outlines if line.startswith("=====")]
    assert sections[-3:-1] == ["ART conformance", "short test summary info"]
    lines = ["FAILED *::TestMine::test_declares_api - *art_api is '1'*"]
    result.stdout.fnmatch_lines(["*short test summary info*", "FAILED *", *lines])


def section(result: pytest.RunResult, title: str) -> list[str]:
    """The lines of the output under a title."""
    start = next(i for i, line in enumerate(result.outlines) if line.strip("= ") == title)
    return list(itertools.takewhile(lambda line: not line.startswith("====="), result.outlines[start + 1 :]))


def test_a_suite_without_its_fixture_says_which(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("from art_conformance import InferenceEngineConformance as C\nclass TestX(C):\n    pass\n")
    result = pytester.runpytest(*OPTIONS, "-m", "not slow")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*give the fixture `engine`*"])


def test_listing(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("-p", "no:cacheprovider", "--conformance-list")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*PLG-001*MUST*", "*INF-101*", "*TRN-101*", "*PUB-001*", "*BCK-001*"])


def test_options_choose_what_is_checked(pytester: pytest.Pytester) -> None:
    by_name = Path(__file__).parents[1] / "src" / "art_conformance" / "by_name"
    result = pytester.runpytest(
        "-p", "no:cacheprovider", "--collect-only", "-q", "--plugin", "sound", "--import-mode=importlib", str(by_name)
    )
    lines = result.stdout.str()
    assert "TestPlugin" in lines
    assert "TestBackend" not in lines
    assert "TestInferenceEngine" not in lines


def test_an_id_is_given_once_and_a_requirement_is_a_sentence() -> None:
    class Twice:
        @check("AAA-001", MUST, "One thing.")
        def test_one(self) -> None: ...

        @check("AAA-001", SHOULD, "Another thing.")
        def test_two(self) -> None: ...

    class Hidden(Twice):
        @check("AAA-002", MUST, "A third thing.")
        def test_one(self) -> None: ...

    with pytest.raises(ValueError, match="AAA-001"):
        list(checks_of(Twice))
    with pytest.raises(ValueError, match="test_one"):
        list(checks_of(Hidden))
    for id, text in (("A-1", "Fine."), ("AAA-001", "No full stop"), ("AAA-001", "Two\nlines.")):
        with pytest.raises(ValueError, match=r"AAA-001|A-1"):
            check(id, MUST, text)


async def test_a_streamed_line_ends_at_a_line_feed_and_at_no_other_character() -> None:
    said = 'data: {"content": "a\u2028b\u0085c"}'
    answer = httpx.Response(200, content=f"{said}\n\ndata: [DONE]".encode())
    assert [line async for line in event_lines(answer)] == [said, "data: [DONE]"]


async def test_an_adapter_that_was_refused_fails_only_who_asks_for_it() -> None:
    class Mine(OpenAIServerEngine):
        name = "mine"

        def launch(self, config: InferenceLaunch) -> LaunchPlan:
            raise NotImplementedError

    launch = InferenceLaunch(
        base_model=Path("base"), served_name="base", host="127.0.0.1", port=1, api_key="key", python="python"
    )
    nothing = httpx.MockTransport(lambda request: httpx.Response(404, json={"error": "no such path"}))
    process: Any = None
    async with httpx.AsyncClient(transport=nothing, base_url="http://127.0.0.1") as client:
        live = LiveEngine(Mine(), launch, process, client)
        await live.hold({"agent@1": Path("agent")})
        with pytest.raises(EngineRefused, match="load adapter agent@1: HTTP 404: no such path"):
            await live.chat("agent@1", messages=[])
        assert live.prepared("completions", None, {"prompt": [1]})["model"] == "base"
