"""The pytest plugin: options, what is collected, what a failing SHOULD and a skipped check count as, and the report.

Imported by pytest in every run of the environment, so it imports nothing of ART at the top.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

import pytest

from .requirements import Level, checks_of, requirement_of, suite_of

if TYPE_CHECKING:
    from .report import ConformanceReport, Outcome

pytest.register_assert_rewrite(__package__)

UNDECLARED = pytest.StashKey[bool]()
_KILLED_BEFORE = pytest.StashKey["int | None"]()
_REPORT = pytest.StashKey["ConformanceReport"]()
_PROPERTY = "art_conformance"
_OUTCOME = "art_conformance_outcome"
TARGETS = ("backend", "inference_engine", "training_engine", "plugin")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("art-conformance", "ART conformance")
    group.addoption("--backend", help="Check the installed backend of this name.")
    group.addoption("--inference-engine", help="Check the installed inference engine of this name.")
    group.addoption("--training-engine", help="Check the installed training engine of this name.")
    group.addoption("--plugin", action="append", help="Check the installed plugin of this name; may be repeated.")
    group.addoption(
        "--backend-args",
        default='{"path": "{tmp}", "in_process": true, "max_adapters": 64}',
        help="The backend's keyword arguments as JSON; {tmp} is an empty folder. Default: %(default)s.",
    )
    group.addoption("--engine-args", default="{}", help="The inference engine's own arguments, as JSON.")
    group.addoption("--engine-python", help="The interpreter of the engine's environment. Default: as its card says.")
    group.addoption(
        "--conformance-model",
        type=Path,
        help="A folder of weights to check with. Default: a tiny random model, made on the spot.",
    )
    group.addoption("--conformance-list", action="store_true", help="List every requirement and leave.")
    group.addoption("--conformance-report", type=Path, metavar="FILE", help="Write the outcomes as JSON.")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: starts real processes or needs more than a few seconds")
    # Registered by pytest-xdist too, where that is installed.
    config.addinivalue_line("markers", "xdist_group(name): tests that must run in one worker")


@pytest.fixture(scope="session")
def own_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite's own tiny random model, made once a run."""
    from .tiny_model import write_base_model

    return write_base_model(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def conformance_model(request: pytest.FixtureRequest) -> Path:
    """The folder of weights that live checks use: --conformance-model, or the suite's own tiny model."""
    given = request.config.getoption("--conformance-model")
    if given is None:
        own: Path = request.getfixturevalue("own_tiny_model")
        return own
    folder = Path(given).resolve()
    if not (folder / "config.json").is_file():
        raise pytest.UsageError(f"--conformance-model={given}: there is no config.json in it")
    return folder


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    if not config.getoption("--conformance-list"):
        return None
    from .catalogue import as_text

    print(as_text())
    return 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = {target for target in TARGETS if config.getoption(target)}
    left_out = []
    for item in items:
        cls: Any = getattr(item, "cls", None)
        suite = None if cls is None else suite_of(cls)
        if suite is None or cls is suite:
            continue
        _prepare(item, cls, suite)
        target = getattr(cls, "conformance_target", None)
        if target is not None and named and target not in named:
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _prepare(item: pytest.Item, cls: type, suite: type) -> None:
    by_name = {name: (function, requirement) for name, function, requirement in checks_of(suite)}
    ids = {requirement.id for _, requirement in by_name.values()}
    known = dict(getattr(cls, "known_failures", {}))
    for id, reason in known.items():
        if id not in ids:
            raise pytest.UsageError(f"{cls.__name__}.known_failures names {id}, which {suite.__name__} does not have")
        if not str(reason).strip():
            raise pytest.UsageError(f"{cls.__name__}.known_failures gives no reason for {id}")
    for name, (function, checked) in by_name.items():
        if getattr(cls, name) is not function:
            raise pytest.UsageError(
                f"{cls.__name__} overrides {name}, the check of {checked.id}. A check can't be replaced: list it"
                f" in known_failures = {{{checked.id!r}: 'the reason'}} instead"
            )
    requirement = requirement_of(getattr(item, "function", None))
    if requirement is None:
        return
    callspec = getattr(item, "callspec", None)
    checked_by_name = callspec.id if callspec else _named_target(item.config, cls)
    subject = item.nodeid.rpartition("::")[0] + (f"[{checked_by_name}]" if checked_by_name else "")
    properties = {"suite": suite.__name__, "subject": subject, "id": requirement.id, "level": requirement.level.value}
    item.user_properties.append((_PROPERTY, properties))
    item.add_marker(pytest.mark.xdist_group(subject))
    if requirement.id in known:
        item.add_marker(pytest.mark.xfail(reason=known[requirement.id], strict=True))


def _named_target(config: pytest.Config, cls: type) -> str:
    """What a class that checks by name checks in this run; empty for a class that says itself what it checks."""
    kind = getattr(cls, "conformance_target", None)
    if kind is None:
        return ""
    from .targets import targets

    name = str(getattr(targets(config), kind))
    engines = [config.getoption(option) for option in ("inference_engine", "training_engine")]
    chosen = " and ".join(filter(None, engines)) if kind == "backend" else ""
    return f"{name} with {chosen}" if chosen else name


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if _is_a_check(item):
        from .faults import killed_for_memory

        item.stash[_KILLED_BEFORE] = killed_for_memory()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    requirement = requirement_of(getattr(item, "function", None))
    if requirement is None or not _is_a_check(item) or report.passed:
        return report
    if report.skipped and item.stash.get(UNDECLARED, False):
        return report
    from .faults import excuse_for
    from .report import Outcome

    if call.excinfo is None:
        # It raised nothing and failed all the same: a known failure that passes, whatever its level.
        _count_as(report, Outcome.UNEXPECTED_PASS, str(report.longrepr))
        return report

    error = call.excinfo.value
    excuse = excuse_for(error, item.stash.get(_KILLED_BEFORE, None), Path(gettempdir()))
    if excuse is not None:
        _count_as(report, excuse.outcome, excuse.reason)
    elif isinstance(error, pytest.skip.Exception):
        _count_as(report, Outcome.UNTESTABLE, str(error))
    elif report.failed and requirement.level is Level.SHOULD:
        report.sections.append(("conformance", str(report.longrepr)))
        report.wasxfail = f"{requirement.id} is a SHOULD and is not met"
        report.outcome = "skipped"
        report.user_properties.append((_OUTCOME, (Outcome.NOT_MET.value, _last_line(report))))
    return report


def _is_a_check(item: pytest.Item) -> bool:
    return any(name == _PROPERTY for name, _ in item.user_properties)


def _count_as(report: pytest.TestReport, outcome: Outcome, reason: str) -> None:
    """Have a check that isn't met count as something else, for a reason. It fails the run, whatever its level."""
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = reason
        report.__dict__.pop("wasxfail", None)
    report.sections.append(("conformance", f"{outcome.value}: {reason}"))
    report.user_properties.append((_OUTCOME, (outcome.value, reason[:300])))


def _property(report: pytest.TestReport, wanted: str) -> Any:
    return next((value for name, value in report.user_properties if name == wanted), None)


class _Collector:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = _property(report, _PROPERTY)
        if properties is None or (report.when != "call" and report.passed):
            return
        from .report import Outcome

        counted = _property(report, _OUTCOME)
        expected = getattr(report, "wasxfail", None)
        if counted is not None:
            outcome, detail = Outcome(counted[0]), counted[1]
        elif report.failed:
            outcome, detail = Outcome.NOT_MET, _last_line(report)
        elif report.passed:
            outcome, detail = Outcome.MET, ""
        elif expected is None:
            outcome, detail = Outcome.UNDECLARED, ""
        else:
            outcome, detail = Outcome.KNOWN_FAILURE, str(expected).removeprefix("reason: ")
        _report_of(self._config).note(properties, outcome, detail)


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(_Collector(session.config), "art-conformance-collector")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    report = config.stash.get(_REPORT, None)
    if report is None:
        return
    terminalreporter.write_sep("=", "ART conformance")
    for line in report.lines(verbose=config.get_verbosity() > 0):
        terminalreporter.write_line(line)
    path = config.getoption("--conformance-report")
    if path is not None:
        report.write(path)
        terminalreporter.write_line(f"written: {path}")


def _report_of(config: pytest.Config) -> ConformanceReport:
    from .report import ConformanceReport

    if _REPORT not in config.stash:
        config.stash[_REPORT] = ConformanceReport()
    return config.stash[_REPORT]


def _last_line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr or report.sections[-1:] or "")
    lines = [line for line in str(text).splitlines() if line.strip()]
    return lines[0][:300] if lines else ""
