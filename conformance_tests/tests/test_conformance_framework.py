"""How the suite itself behaves: levels, known failures, skips, undeclared capabilities, overriding, the report."""

from __future__ import annotations

import itertools
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from art_conformance import MUST, SHOULD, check, faults
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
    """Run checks on the installed plugin `sound`, changed by `body`, and give the report of its only suite."""
    write(pytester, body)
    report = pytester.path / "report.json"
    result = pytester.runpytest(*OPTIONS, f"--conformance-report={report}", *arguments)
    content = json.loads(report.read_text()) if report.exists() else []
    return result, (content[0] if content else {})


def write(pytester: pytest.Pytester, body: str) -> None:
    """A test file of checks on the installed plugin `sound`."""
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


def install_package(pytester: pytest.Pytester, name: str) -> None:
    """Make the installed module of a plugin a package with a marker of types, which is all that it lacked."""
    module = pytester.path / "site" / f"{name}_plugin.py"
    (package := module.with_suffix("")).mkdir()
    shutil.move(module, package / "__init__.py")
    (package / "py.typed").touch()


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
@pytest.mark.parametrize("id", ["PLG-007", "PLG-014"])
def test_a_known_failure_that_passes_fails_the_run_whatever_its_level(pytester: pytest.Pytester, id: str) -> None:
    install_package(pytester, "sound")
    result, report = run(pytester, f"    known_failures = {{{id!r}: 'not before 1.0'}}\n")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=13, failed=1)
    assert outcome_of(report, id) == "unexpected pass"
    assert (report["conformant"], report["verdict"]) == (False, "NOT conformant")


def test_who_has_a_known_failure_of_a_should_is_not_conformant_either(pytester: pytest.Pytester) -> None:
    result, report = run(pytester, "    known_failures = {'PLG-014': 'it is a single file'}\n")
    assert result.ret == pytest.ExitCode.OK
    assert outcome_of(report, "PLG-014") == "known failure"
    assert (report["conformant"], report["verdict"]) == (False, "NOT conformant")
    result.stdout.fnmatch_lines(["*TestMine: NOT conformant (13 met, 1 known failure)", "*it is a single file*"])


@pytest.mark.parametrize("known", ["{'PLG-999': 'why'}", "{'PLG-007': ' '}"])
def test_a_known_failure_needs_an_id_that_exists_and_a_reason(pytester: pytest.Pytester, known: str) -> None:
    result, _ = run(pytester, f"    known_failures = {known}\n")
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_a_check_cannot_be_replaced(pytester: pytest.Pytester) -> None:
    result, _ = run(pytester, "    def test_declares_api(self):\n        pass\n")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*overrides test_declares_api, the check of PLG-002*"])


FAILING = """
    @pytest.fixture(scope='class')
    @classmethod
    def info(cls):
        {raising}
"""


@pytest.mark.parametrize(
    ("raising", "said"),
    [
        ("pytest.skip('not here')", "not here"),
        (
            "from art_conformance import oracle; from pathlib import Path; import sys; sys.modules['torch'] = None;"
            " oracle.oracle_for(Path('nowhere'))",
            "torch is missing: pip install 'art-conformance",
        ),
        (
            "from art_runtime.environments import python_for; from art_core import installed_plugins;"
            " python_for(installed_plugins().inference_engine('sglang'))",
            "art engines install sglang",
        ),
    ],
    ids=["skipped", "no oracle", "no environment"],
)
def test_a_missing_prerequisite_is_untestable_and_never_a_pass(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, raising: str, said: str
) -> None:
    monkeypatch.setenv("ART_CACHE_DIR", str(pytester.path / "cache"))
    result, report = run(pytester, FAILING.format(raising=raising))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert outcome_of(report, "PLG-001") == "untestable"
    assert (report["conformant"], report["verdict"]) == (False, "untestable")
    result.stdout.fnmatch_lines(["*TestMine: untestable (12 met, 1 NOT MET, 1 untestable)", f"*{said}*"])


ENOSPC = "OSError(28, 'No space left on device')"


@pytest.mark.parametrize(
    ("raising", "outcome"),
    [
        ("raise MemoryError", "fault of the machine"),
        (f"raise {ENOSPC}", "fault of the machine"),
        (f"raise RuntimeError('it was not written') from {ENOSPC}", "fault of the machine"),
        ("raise OSError(13, 'Permission denied')", "NOT MET"),
        ("raise RuntimeError('MemoryError: No space left on device')", "NOT MET"),
        (f"\n        try: raise {ENOSPC}\n        except OSError: assert False", "NOT MET"),
    ],
)
def test_what_the_machine_did_is_told_from_what_the_subject_did_by_the_kind_of_its_error(
    pytester: pytest.Pytester, raising: str, outcome: str
) -> None:
    result, report = run(pytester, FAILING.format(raising=raising))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert outcome_of(report, "PLG-001") == outcome
    assert report["verdict"] == ("fault of the machine" if outcome != "NOT MET" else "NOT conformant")
    result.stdout.fnmatch_lines([f"*PLG-001*MUST*{outcome}*"])


@pytest.mark.slow
def test_a_fault_of_the_machine_is_no_known_failure_and_no_unmet_should(pytester: pytest.Pytester) -> None:
    body = FAILING.format(raising="raise MemoryError")
    _, report = run(pytester, f"    known_failures = {{'PLG-001': 'not yet'}}\n{body}")
    assert outcome_of(report, "PLG-001") == "fault of the machine"
    spoiling = "def pytest_runtest_call(item):\n    if item.name == 'test_is_typed': raise MemoryError\n"
    pytester.makeconftest(spoiling)
    result, report = run(pytester, "")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert outcome_of(report, "PLG-014") == "fault of the machine"
    assert report["verdict"] == "conformant"


OUT_OF_MEMORY = """
from pathlib import Path
from art_conformance import faults

counter = Path(__file__).with_name("counter")

def pytest_sessionstart():
    faults.OOM_COUNTERS[:] = [counter]
    counter.write_text("oom_kill 3")

def pytest_runtest_call(item):
    if item.name == "test_declares_api":
        counter.write_text("low 0\\noom_kill 4")
    if item.name in ("test_declares_api", "test_hooks_exist"):
        assert False, "the server was ended by SIGKILL"
"""


def test_a_check_during_which_the_kernel_ended_a_process_for_memory_says_nothing(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "OOM_COUNTERS", [])
    pytester.makeconftest(OUT_OF_MEMORY)
    _, report = run(pytester, "")
    failed = {entry["id"]: entry["outcome"] for entry in report["checks"] if entry["level"] == "MUST"}
    assert failed.pop("PLG-002") == "fault of the machine"
    assert sorted(set(failed.values())) == ["NOT MET", "met"]


def test_a_disk_that_is_full_is_nobodys_fault(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "FULL_BYTES", 2**80)
    _, report = run(pytester, FAILING.format(raising="assert False"))
    assert outcome_of(report, "PLG-001") == "fault of the machine"


STARTED = """import asyncio, sys
        from pathlib import Path
        from art_core import LaunchPlan
        from art_runtime import SupervisedProcess
        listen = "import socket; socket.socket().bind(('127.0.0.1', {port}))"
        plan = LaunchPlan(argv=(sys.executable, '-c', listen + '; raise SystemExit(3)'))
        asyncio.run(SupervisedProcess.start(plan, port={port}, log_file=Path('log')))"""


@pytest.mark.slow
@pytest.mark.parametrize(("taken", "outcome"), [(True, "fault of the machine"), (False, "NOT MET")])
def test_a_port_that_another_process_holds_is_a_fault_of_the_machine_and_any_other_end_of_a_server_is_not(
    pytester: pytest.Pytester, taken: bool, outcome: str
) -> None:
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        port = here.getsockname()[1]
        if taken:
            here.listen()
        else:
            here.close()
        write(pytester, FAILING.format(raising=STARTED.format(port=port)))
        file = pytester.path / "report.json"
        # In a process of its own, which is younger than the one that listens.
        result = pytester.runpytest_subprocess(*OPTIONS, f"--conformance-report={file}", "-k", "test_is_active")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    (report,) = json.loads(file.read_text(encoding="utf-8"))
    assert outcome_of(report, "PLG-001") == outcome


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
