"""`art plugins new`: what may be called what, where it is written, and that nothing is left half written.

That what it writes works is `tests/packaging/test_third_party.py`'s.
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from art.command_line import cli
from art.plugin_kit import NewPlugin, PluginKind, plan_plugin, write_plugin
from art_core import PluginRegistry
from art_core.errors import InvalidName

KINDS = list(PluginKind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_project_of_each_kind_has_one_name_in_all_its_files(kind: PluginKind, tmp_path: Path) -> None:
    plugin = plan_plugin("very-fast", kind, PluginRegistry())
    written = write_plugin(plugin, tmp_path / "project")
    assert written == sorted(
        p.relative_to(tmp_path / "project") for p in (tmp_path / "project").rglob("*") if p.is_file()
    )
    for file in written:
        text = (tmp_path / "project" / file).read_text(encoding="utf-8")
        assert "example" not in f"{file} {text}".lower()
        if file.suffix == ".py":
            ast.parse(text)
    project = tomllib.loads((tmp_path / "project" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == plugin.distribution == f"{kind.prefix}very-fast"
    ((name, module),) = project["entry-points"]["art"].items()
    assert (name, module.partition(".")[0]) == ("very-fast", plugin.module)
    assert {".gitignore", "README.md"} <= {str(file) for file in written}
    assert Path(".github/workflows/conformance.yml") in written


def test_the_distribution_s_own_name_may_be_given(tmp_path: Path) -> None:
    assert plan_plugin("art-tracker-ledger", PluginKind.TRACKER, PluginRegistry()).name == "ledger"


@given(st.text(max_size=12))
def test_a_name_is_one_that_python_and_pip_take_or_is_refused(name: str) -> None:
    try:
        plugin = plan_plugin(name, PluginKind.BACKEND, PluginRegistry())
    except InvalidName:
        return
    assert plugin.module.isidentifier()
    assert plugin.class_prefix.isidentifier()
    assert plugin.distribution == plugin.distribution.lower()


@pytest.mark.parametrize("name", ["", "Fast", "fast_one", "../fast", "9fast", "fast-", "a--b", "fast one", "fäst"])
def test_a_name_that_cannot_be_is_refused_with_one_that_can(name: str) -> None:
    with pytest.raises(InvalidName, match=f"{re.escape(repr(name))}: use small letters, digits and single hyphens"):
        plan_plugin(name, PluginKind.TRACKER, PluginRegistry())


def test_the_name_of_an_installed_plugin_is_refused(tmp_path: Path) -> None:
    told = CliRunner().invoke(
        cli, ["plugins", "new", "tracker-files", "--kind", "tracker", "--directory", str(tmp_path / "new")]
    )
    assert told.exit_code == 1
    assert "The name 'tracker-files' is taken by art-tracker-files" in told.stderr
    assert not (tmp_path / "new").exists()


def test_what_is_there_stays_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept", encoding="utf-8")
    told = CliRunner().invoke(cli, ["plugins", "new", "fast", "--kind", "backend", "--directory", str(tmp_path)])
    assert told.exit_code == 1
    assert f"{tmp_path} is there already and isn't empty" in told.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_written_is_told_and_nothing_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    told = CliRunner().invoke(
        cli, ["plugins", "new", "fast", "--kind", "backend", "--directory", str(tmp_path / "file" / "x")]
    )
    assert told.exit_code == 1
    assert "file" in told.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_text

    def full(self: Path, *args: object, **kwargs: object) -> int:
        if self.name == "py.typed":
            raise OSError(28, "No space left on device", str(self))
        return real(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_plugin(NewPlugin("fast", PluginKind.TRACKER), tmp_path / "project")
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_comes_next_and_teaches(tmp_path: Path) -> None:
    told = CliRunner().invoke(
        cli, ["plugins", "new", "fast", "--kind", "tracker", "--directory", str(tmp_path / "my place")]
    )
    assert told.exit_code == 0
    assert "art-tracker-fast is a working tracker named 'fast'." in told.stdout
    assert f"cd '{tmp_path / 'my place'}'" in told.stdout
    assert "art plugins check" in told.stdout
