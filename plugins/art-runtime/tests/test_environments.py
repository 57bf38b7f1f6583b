"""Where an engine's interpreter is found, what pip's settings become for uv, and how an environment is made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from art_core import InferenceEngineSpec, TrainingEngineSpec
from art_core.errors import PluginError
from art_engine_kit.environment import EnvironmentSpec, FlavourSpec
from art_runtime import environments
from art_runtime.environments import (
    EnvironmentMissing,
    engine_for,
    environment_for,
    first_met,
    indexes,
    locate,
    machine_flavour,
    python_for,
)
from art_runtime.environments.doctor import examine
from art_runtime.environments.indexes import as_uv, read_pip_settings
from art_runtime.environments.install import steps

FLAVOUR = FlavourSpec(requirements=("no-such-distribution-7c1==1.0",), probe=("-c", "pass"))
ABSENT = EnvironmentSpec(
    provided_by=("no-such-distribution-7c1>=1",), shown=(), flavours={"cpu": FLAVOUR, "cuda": FLAVOUR}
)
HERE = EnvironmentSpec(provided_by=("pytest>=9999", "pytest>=1"), shown=("pytest",), flavours={"cpu": FLAVOUR})


def spec(environment: str | None) -> InferenceEngineSpec:
    return InferenceEngineSpec(
        name="imaginary", factory="nowhere:Engine", summary="An engine.", environment=environment
    )


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ART_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch) -> str:
    module = type(sys)("art_test_environments_7c1")
    module.ABSENT, module.HERE, module.NONSENSE = ABSENT, HERE, object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_an_engine_without_environment_runs_here() -> None:
    assert python_for(spec(None)) == sys.executable
    training = TrainingEngineSpec(name="t", factory="nowhere:T", summary="Trains.")
    assert python_for(training) == sys.executable
    with pytest.raises(EnvironmentMissing, match="needs no environment"):
        environment_for(spec(None))


def test_an_engine_that_is_importable_here_runs_here(own_module: str) -> None:
    found = locate(spec(f"{own_module}:HERE"))
    assert found.path == sys.executable
    assert "pytest" in found.why


def test_requirements_are_met_by_metadata_alone() -> None:
    assert first_met(("pytest>=9999", "no-such-distribution-7c1")) is None
    assert (first_met(("no-such-distribution-7c1", "pytest>=1")) or "").startswith("pytest ")


def test_a_missing_environment_says_the_one_command(own_module: str) -> None:
    with pytest.raises(EnvironmentMissing) as missing:
        python_for(spec(f"{own_module}:ABSENT"))
    assert "art engines install imaginary\n" in str(missing.value)
    assert "auto_install=True" in str(missing.value)
    other = "cpu" if machine_flavour() == "cuda" else "cuda"
    with pytest.raises(EnvironmentMissing, match=f"art engines install imaginary --flavour {other}"):
        python_for(spec(f"{own_module}:ABSENT"), flavour=other)


def test_the_users_own_interpreter_wins(own_module: str, tmp_path: Path) -> None:
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    # The link itself, not what it points to: a virtual environment's interpreter is one.
    assert python_for(spec(f"{own_module}:HERE"), python=link) == str(link)
    with pytest.raises(EnvironmentMissing, match="no program"):
        python_for(spec(f"{own_module}:HERE"), python=tmp_path / "nothing")


def test_an_environment_that_cannot_be_imported_names_the_engine(own_module: str) -> None:
    for broken in ("art_no_such_module:X", f"{own_module}:MISSING", f"{own_module}:NONSENSE"):
        with pytest.raises(PluginError, match="imaginary"):
            python_for(spec(broken))


def test_an_unknown_flavour_names_the_known(own_module: str) -> None:
    with pytest.raises(EnvironmentMissing, match="It has: cpu"):
        environment_for(spec(f"{own_module}:HERE"), "cuda")


def test_an_engine_for_a_cpu_alone_runs_so_where_a_gpu_is(own_module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("art_runtime.environments.places.machine_flavour", lambda: "cuda")
    assert environment_for(spec(f"{own_module}:HERE")).flavour == "cpu"
    assert environment_for(spec(f"{own_module}:ABSENT")).flavour == "cuda"
    assert examine(spec(f"{own_module}:HERE")).flavour == "cpu"


def test_the_folder_follows_what_goes_in(tmp_path: Path, own_module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[own_module]

    def folder(flavour: FlavourSpec) -> Path:
        monkeypatch.setattr(module, "ABSENT", replace(ABSENT, flavours={"cpu": flavour}))
        return environment_for(spec(f"{own_module}:ABSENT"), "cpu").folder

    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text("[project]\nname='a'\nversion='1'\n")
    with_project = replace(FLAVOUR, local_projects=(project,))
    seen = {folder(FLAVOUR), folder(replace(FLAVOUR, uninstall=("x",))), folder(with_project)}
    (project / "pyproject.toml").write_text("[project]\nname='a'\nversion='2'\n")
    seen.add(folder(with_project))
    assert len(seen) == 4
    assert folder(replace(FLAVOUR, hint="try this", probe=("-c", "1"))) == folder(FLAVOUR)
    assert all(str(tmp_path / "cache") in str(each) for each in seen)


def test_pips_settings_are_read_in_pips_order() -> None:
    listing = "\n".join(
        [
            ":env:.find-links='/wheels /more'",
            "global.extra-index-url='https://one.example/simple\\nhttps://two.example/simple'",
            "global.find-links='/overridden'",
            "install.no-binary=':none:'",
            "unknown.find-links='/never'",
        ]
    )
    found = read_pip_settings(listing)
    assert found["find-links"] == "/wheels /more"
    assert found["extra-index-url"].split() == ["https://one.example/simple", "https://two.example/simple"]


def test_uv_looks_where_pip_looks() -> None:
    pip = {
        "find-links": "/wheels /more",
        "index-url": "https://main.example/simple",
        "extra-index-url": "https://extra.example/simple",
        "cert": "/etc/cert.pem",
    }
    arguments, variables = as_uv(pip, {})
    assert " ".join(arguments) == (
        "--find-links /wheels --find-links /more --default-index https://main.example/simple"
        " --index https://extra.example/simple --index-strategy unsafe-best-match"
    )
    assert variables["SSL_CERT_FILE"] == "/etc/cert.pem"
    own, added = as_uv(pip, {"UV_DEFAULT_INDEX": "x", "UV_FIND_LINKS": "y", "SSL_CERT_FILE": "z"})
    assert own == []
    assert "SSL_CERT_FILE" not in added
    assert as_uv({}, {})[0] == []


def test_a_cache_that_pip_is_told_not_to_keep_uv_keeps_neither() -> None:
    assert as_uv({"no-cache-dir": "1"}, {})[1]["UV_NO_CACHE"] == "1"
    assert "UV_NO_CACHE" not in as_uv({"no-cache-dir": "false"}, {})[1]


@pytest.mark.slow
@pytest.mark.parametrize("home", [None, "/dev/null", "/"])
def test_run_as_a_program_it_installs_where_pip_would_with_nothing_of_ours(tmp_path: Path, home: str | None) -> None:
    """As `make setup` does, in an environment that holds uv alone, from a place that only pip was told of."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        pytest.skip("there is no uv to install with")
    venv, wheels = tmp_path / "venv", tmp_path / "wheels"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    (venv / "bin" / "uv").symlink_to(uv)
    wheels.mkdir()
    info = "art_tiny_7c2-1.0.dist-info"
    with zipfile.ZipFile(wheels / "art_tiny_7c2-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("art_tiny_7c2.py", "VALUE = 1\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: art-tiny-7c2\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    env = {"PATH": os.defpath, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    if home is not None:
        env["HOME"] = home
    python = str(venv / "bin" / "python")
    done = subprocess.run(
        [python, "-P", indexes.__file__, "art-tiny-7c2"], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "art-tiny-7c2==1.0" in done.stderr
    subprocess.run([python, "-c", "import art_tiny_7c2"], env=env, check=True)


@pytest.mark.parametrize("uv", ["/usr/bin/uv", None])
def test_the_steps_come_in_the_order_that_is_declared(uv: str | None, own_module: str, monkeypatch: Any) -> None:
    full = FlavourSpec(
        requirements=("a==1", "b"),
        without_dependencies=("c==2",),
        local_projects=(Path("/plugin/named"),),
        uninstall=("d",),
        probe=("-c", "pass"),
    )
    monkeypatch.setattr(sys.modules[own_module], "ABSENT", replace(ABSENT, flavours={"cpu": full}))
    environment = environment_for(spec(f"{own_module}:ABSENT"), "cpu")
    commands = [words for _, words in steps(environment, Path("/v"), Path("/copies"), uv)]
    assert str(Path("/v")) in commands[0]
    assert commands[1][-2:] == ["a==1", "b"]
    assert commands[2][-2:] == ["--no-deps", "c==2"]
    assert commands[3][-2:] == ["--no-deps", "/copies/named"]
    assert commands[4][-1] == "d"
    assert "uninstall" in commands[4]


def test_a_marker_without_its_interpreter_is_no_environment(own_module: str) -> None:
    environment = environment_for(spec(f"{own_module}:ABSENT"))
    environment.folder.mkdir(parents=True)
    for content in ("", "{}", "[]", '{"venv": "venv-gone"}'):
        environment.marker.write_text(content)
        assert environment.python() is None
        assert environment.facts() == {}


class Flavoured:
    """Made as an engine with flavours is."""

    def __init__(self, flavour: str | None = None) -> None:
        self.flavour = flavour


def test_an_engine_is_made_in_the_machines_flavour(own_module: str) -> None:
    sys.modules[own_module].Engine = Flavoured  # type: ignore[attr-defined]
    with_flavours = replace(spec(f"{own_module}:HERE"), factory=f"{own_module}:Engine")
    assert engine_for(with_flavours).flavour == machine_flavour()
    assert engine_for(with_flavours, "cuda").flavour == "cuda"
    assert engine_for(replace(with_flavours, environment=None)).flavour is None


def test_the_cache_is_looked_up_at_each_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("one", "two"):
        monkeypatch.setenv("ART_CACHE_DIR", str(tmp_path / name))
        assert environments.engine_folder("x") == tmp_path / name / "engines" / "x"
