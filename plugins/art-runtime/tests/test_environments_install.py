"""Real environments, made of a tiny wheel: by two at once, after a kill, anew, removed; and `art engines` on them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from art.command_line import cli
from art_core import InferenceEngineSpec, PluginRegistry, hookimpl
from art_core.errors import ProcessFailed
from art_engine_kit.environment import EnvironmentSpec, FlavourSpec
from art_runtime import engine_cli
from art_runtime.environments import EngineEnvironment, environment_for, machine_flavour, python_for
from art_runtime.environments import install as environments_install
from art_runtime.environments.doctor import examine
from art_runtime.environments.install import install, installer, remove

SPEC = InferenceEngineSpec(
    name="tiny", factory="nowhere:Engine", summary="An engine.", environment="art_test_tiny_engine:ENVIRONMENT"
)
pytestmark = pytest.mark.skipif(installer() is None, reason="made with uv in seconds; without uv see the slow test")


def write_wheel(folder: Path, *, works: bool = True) -> Path:
    """A wheel of one module that can be imported, or not."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "art_tiny_7c1-1.0-py3-none-any.whl"
    info = "art_tiny_7c1-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("art_tiny_7c1.py", "VALUE = 1\n" if works else "raise RuntimeError('no such kernel')\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: art-tiny-7c1\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def flavours(*requirements: str, disk_bytes: int | None = None) -> EnvironmentSpec:
    flavour = FlavourSpec(
        requirements=requirements, probe=("-c", "import art_tiny_7c1"), hint="Ask the wheel.", disk_bytes=disk_bytes
    )
    return EnvironmentSpec(
        provided_by=("art-tiny-7c1",), shown=("art-tiny-7c1",), flavours={"cpu": flavour, "cuda": flavour}
    )


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.setenv("ART_CACHE_DIR", str(tmp_path / "cache"))
    made = ModuleType("art_test_tiny_engine")
    made.ENVIRONMENT = flavours(str(write_wheel(tmp_path / "wheels")))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


@pytest.fixture
def environment(module: ModuleType) -> EngineEnvironment:
    return environment_for(SPEC)


@pytest.mark.slow
def test_installed_once_then_found(environment: EngineEnvironment) -> None:
    python = install(environment)
    assert python_for(SPEC) == str(python)
    assert environment.facts()["versions"] == {"art-tiny-7c1": "1.0"}
    facts = environment.facts()
    assert install(environment) == python
    assert environment.facts() == facts, "it was made a second time"


@pytest.mark.slow
def test_auto_install_installs(module: ModuleType) -> None:
    assert python_for(SPEC, auto_install=True) == str(environment_for(SPEC).python())


@pytest.mark.slow
def test_made_anew_leaves_one(environment: EngineEnvironment) -> None:
    first = install(environment)
    second = install(environment, again=True)
    assert first != second
    assert environment.python() == second
    assert [folder.name for folder in environment.folder.glob("venv-*")] == [second.parents[1].name]


@pytest.mark.slow
def test_a_failure_says_why_and_leaves_nothing(module: ModuleType) -> None:
    module.ENVIRONMENT = flavours("/no/such/wheel-1.0-py3-none-any.whl")
    environment = environment_for(SPEC)
    with pytest.raises(ProcessFailed, match=r"Ask the wheel\.") as failure:
        install(environment)
    assert "no/such/wheel" in str(failure.value)
    assert environment.python() is None
    assert not list(environment.folder.glob("venv-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("disk_bytes", "said"),
    [
        (None, r"[\d.]+ GB are free"),
        (2_000_000, r"takes about 0\.0 GB of the [\d.]+ GB that are free, with"),
        (10**18, r"takes about 1000000000\.0 GB of the .* \(perhaps too little: .*ART_CACHE_DIR"),
    ],
)
def test_sizes_are_said_before_and_after(
    module: ModuleType, capfd: pytest.CaptureFixture[str], disk_bytes: int | None, said: str
) -> None:
    module.ENVIRONMENT = flavours(*module.ENVIRONMENT.flavours["cpu"].requirements, disk_bytes=disk_bytes)
    environment = environment_for(SPEC)
    install(environment)
    before, after = capfd.readouterr().err.splitlines()
    assert re.search(said, before), before
    assert str(environment.folder) in before
    assert re.search(r"installed in \d+ s, [\d.]+ GB", after), after


def child(environment: EngineEnvironment, before: str) -> subprocess.Popen[str]:
    """Another process that installs the same environment."""
    code = f"""
import sys, time
from types import ModuleType
from art_runtime.environments import install as environments_install
from art_runtime.environments import environment_for
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_environments_install import SPEC, flavours
made = ModuleType("art_test_tiny_engine")
made.ENVIRONMENT = flavours(*{list(environment.spec.requirements)!r})
sys.modules[made.__name__] = made
{before}
print(environments_install.install(environment_for(SPEC)), flush=True)
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_at_once_make_one(environment: EngineEnvironment) -> None:
    both = [child(environment, "") for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert {answer[0].strip().splitlines()[-1] for answer in answers} == {str(environment.python())}
    assert len(list(environment.folder.glob("venv-*"))) == 1


@pytest.mark.slow
def test_a_kill_before_the_marker_is_made_good(environment: EngineEnvironment) -> None:
    hang = (
        "environments_install.write_json_atomically = lambda *_: (print('at the marker', flush=True), time.sleep(600))"
    )
    process = child(environment, hang)
    assert process.stdout is not None
    try:
        assert process.stdout.readline().strip() == "at the marker"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert len(list(environment.folder.glob("venv-*"))) == 1
    assert environment.python() is None
    python = install(environment)
    assert [folder.name for folder in environment.folder.glob("venv-*")] == [python.parents[1].name]


@pytest.mark.slow
def test_the_installer_ends_with_who_is_killed(environment: EngineEnvironment, tmp_path: Path) -> None:
    # The step under way is a program that would run on for ten minutes.
    pid_file = tmp_path / "pid"
    program = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    process = child(
        environment, f"environments_install.steps = lambda *_: [('x', [sys.executable, '-c', {program!r}])]"
    )
    deadline = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    pid = int(pid_file.read_text())
    process.kill()
    process.communicate(timeout=60)
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_doctor_finds_nothing_and_something(module: ModuleType, tmp_path: Path) -> None:
    install(environment_for(SPEC))
    healthy = examine(SPEC)
    assert healthy.problem == ""
    assert healthy.versions["art-tiny-7c1"] == "1.0"
    module.ENVIRONMENT = flavours(str(write_wheel(tmp_path / "broken", works=False)))
    install(environment_for(SPEC))
    assert "no such kernel" in examine(SPEC).problem
    assert "art_tiny_7c1" in examine(SPEC, python=sys.executable).problem


@pytest.mark.slow
def test_remove_takes_all_of_an_engine(module: ModuleType, tmp_path: Path) -> None:
    old = environment_for(SPEC)
    install(old)
    module.ENVIRONMENT = flavours(str(write_wheel(tmp_path / "newer")))
    new = environment_for(SPEC)
    install(new)
    assert old.folder != new.folder
    assert set(remove("tiny")) == {old.folder, new.folder}
    assert new.python() is None
    assert remove("tiny") == []


@pytest.mark.slow
def test_without_uv_pip_does_it(environment: EngineEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments_install, "installer", lambda: None)
    python = install(environment)
    assert environment.facts()["made_with"] == "venv and pip"
    subprocess.run([str(python), "-c", "import art_tiny_7c1"], check=True, env={**os.environ, "PYTHONPATH": ""})


@pytest.mark.slow
def test_art_engines(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plugin:
        art_api = 1

        @hookimpl
        def art_register_inference_engines(self) -> list[InferenceEngineSpec]:
            return [SPEC]

    registry = PluginRegistry()
    registry.register(Plugin(), "tiny")
    monkeypatch.setattr(engine_cli, "installed_plugins", lambda: registry)
    monkeypatch.setenv("COLUMNS", "200")
    if not any(group.name == "engines" for group in cli.registered_groups):
        engine_cli.add_commands(cli)
    run = CliRunner().invoke
    assert "not installed: art engines install tiny" in run(cli, ["engines", "list"]).output
    missing = run(cli, ["engines", "doctor", "tiny"])
    assert missing.exit_code == 1
    assert "art engines install tiny" in missing.output
    installed = run(cli, ["engines", "install", "tiny"])
    assert installed.exit_code == 0, installed.output
    assert "It is installed already" in run(cli, ["engines", "install", "tiny"]).output
    assert f"its own, {machine_flavour()}" in run(cli, ["engines", "list"]).output
    healthy = run(cli, ["engines", "doctor", "tiny"])
    assert healthy.exit_code == 0, healthy.output
    assert "art-tiny-7c1 1.0" in healthy.output
    assert "it works" in healthy.output
    assert "removed" in run(cli, ["engines", "remove", "tiny"]).output
    assert json.dumps("tinny")[1:-1] in run(cli, ["engines", "install", "tinny"]).output
    assert "Did you mean 'tiny'?" in run(cli, ["engines", "install", "tinny"]).output
    assert run(cli, ["engines", "install", "tiny", "--flavour", "gpu"]).exit_code == 1
