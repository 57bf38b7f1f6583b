"""`art plugins`, `check` and `show`, run as a user runs them, with real distributions beside art-core and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ACME = """
    from art_core import InferenceCapability, InferenceEngineSpec, hookimpl

    art_api = 1

    @hookimpl
    def art_register_inference_engines():
        return [InferenceEngineSpec(
            name="acme", factory="acme:Engine", summary="Acme's engine.",
            capabilities=frozenset({InferenceCapability.PAUSE, InferenceCapability.TOOL_CALLS}),
            own_server="Start it with `acme serve`.")]

    @hookimpl
    def art_log_metrics(model, metrics, step, split):
        print("logged", metrics)

    @hookimpl
    def art_register_commands(cli):
        @cli.command()
        def acme():
            print("acme's own command")
"""
MISSPELT = """
    from art_core import hookimpl

    art_api = 1

    @hookimpl
    def art_after_trian(result): ...
"""


def install_bad_ones(site: Any) -> None:
    site.install("art-broken", "import a_library_that_is_gone", plugin="broken")
    site.install("art-ancient", "art_api = 1", plugin="ancient", requires=["art-core<0.1"])
    site.install("art-future", "art_api = 9", plugin="future")
    site.install("art-engine-fast", ACME.replace('"acme"', '"fast"'), plugin="fast")
    site.install("fast-engine-fork", ACME.replace('"acme"', '"fast"'), plugin="fast")
    site.install("art-misspelt", MISSPELT, plugin="misspelt")


def test_no_plugins(plugin_site: Any) -> None:
    listed = plugin_site.art("plugins")
    assert listed.returncode == 0
    assert listed.stdout == "No plugins are installed. To begin: pip install art-backend-local art-engine-torch\n"
    assert json.loads(plugin_site.art("plugins", "--json").stdout) == []


@pytest.mark.slow
def test_good_plugins_are_listed_checked_and_shown(plugin_site: Any) -> None:
    plugin_site.install("art-acme", ACME)
    listed = plugin_site.art("plugins")
    assert listed.returncode == 0
    for word in ("acme", "art-acme", "1.2.0", "active", "inference engine acme"):
        assert word in listed.stdout
    assert listed.stderr == ""
    (row,) = json.loads(plugin_site.art("plugins", "--json").stdout)
    assert row == {
        "name": "acme",
        "distribution": "art-acme",
        "version": "1.2.0",
        "api": 1,
        "status": "active",
        "provides": ["inference engine acme"],
        "capabilities": {"inference engine acme": ["pause", "tool_calls"]},
        "hooks": ["art_log_metrics", "art_register_commands", "art_register_inference_engines"],
        "error": "",
    }
    checked = plugin_site.art("plugins", "check")
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "1 of 1 plugins are active.\n", "")
    shown = plugin_site.art("plugins", "show", "acme")
    assert shown.returncode == 0
    assert shown.stdout.splitlines() == [
        "acme: art-acme 1.2.0, plugin API 1, active",
        "  provides inference engine acme",
        "    pause: Generation can be paused and resumed; requests wait meanwhile and lose nothing.",
        "    tool_calls: Tools reach the chat template, and tool calls are parsed back into the answer.",
        "    a server of your own: Start it with `acme serve`.",
        "  implements art_log_metrics, art_register_commands, art_register_inference_engines",
    ]
    assert plugin_site.art("acme").stdout == "acme's own command\n"


@pytest.mark.slow
def test_bad_plugins_are_listed_with_their_reasons_and_check_exits_with_1(plugin_site: Any) -> None:
    install_bad_ones(plugin_site)
    plugin_site.install("art-acme", ACME)
    listed = plugin_site.art("plugins")
    assert listed.returncode == 0
    for line in (
        "broken (art-broken): it could not be imported: ModuleNotFoundError: No module named 'a_library_that_is_gone'",
        "ancient (art-ancient): it needs art-core <0.1, installed is 0.1.0; upgrade the one or the other",
        "future (art-future): it speaks plugin API 9, art-core speaks 1 to 1; upgrade art-core",
        "fast (art-engine-fast): the plugin name 'fast' is taken by art-engine-fast and fast-engine-fork; uninstall",
        "misspelt (art-misspelt): it implements art_after_trian, which is not a hook. Did you mean 'art_after_train'?",
    ):
        assert line in listed.stdout
    statuses = [row["status"] for row in json.loads(plugin_site.art("plugins", "--json").stdout)]
    assert sorted(statuses) == ["active", "broken", "broken", "duplicate", "duplicate", "incompatible", "incompatible"]
    checked = plugin_site.art("plugins", "check")
    assert checked.returncode == 1
    assert checked.stdout == ""
    lines = checked.stderr.splitlines()
    assert len(lines) == 7
    assert lines[-1] == "1 of 7 plugins are active."
    assert "misspelt (art-misspelt 1.2.0): broken: it implements art_after_trian" in checked.stderr


def test_a_disabled_plugin_is_not_active_for_check_either(plugin_site: Any) -> None:
    plugin_site.install("art-acme", ACME)
    checked = plugin_site.art("plugins", "check", ART_DISABLE_PLUGINS="acme")
    assert checked.returncode == 1
    assert "acme (art-acme 1.2.0): disabled: left out by ART_DISABLE_PLUGINS" in checked.stderr


def test_showing_an_unknown_plugin_lists_those_there_are(plugin_site: Any) -> None:
    plugin_site.install("art-acme", ACME)
    shown = plugin_site.art("plugins", "show", "acne")
    assert shown.returncode == 1
    assert shown.stderr == "No plugin is called 'acne'. Did you mean 'acme'? Installed: acme.\n"


@pytest.mark.slow
def test_a_plugin_whose_commands_fail_leaves_the_command_to_others(plugin_site: Any) -> None:
    plugin_site.install("art-acme", ACME)
    failing = """
        from art_core import hookimpl
        art_api = 1
        @hookimpl
        def art_register_commands(cli):
            raise KeyError("settings")
    """
    plugin_site.install("art-failing", failing)
    assert plugin_site.art("acme").stdout == "acme's own command\n"
    checked = plugin_site.art("plugins", "check")
    assert checked.returncode == 1
    assert (
        "failing (art-failing 1.2.0): broken: its art_register_commands failed: KeyError: 'settings'" in checked.stderr
    )


def test_tracing_says_what_loads_and_what_is_called(plugin_site: Any) -> None:
    plugin_site.install("art-acme", ACME)
    plugin_site.install("art-broken", "import a_library_that_is_gone", plugin="broken")
    script = """
import asyncio
from art_core import announce, installed_plugins
registry = installed_plugins()
asyncio.run(announce(registry, "art_log_metrics", model=None, metrics={"a": 1}, step=1, split="val"))
registry.hooks.hook.art_resolve_base_model(name="x")
"""
    traced = plugin_site.python("-W", "ignore", "-c", script, ART_TRACE_PLUGINS="1")
    assert traced.stdout == "logged {'a': 1}\n"
    assert traced.stderr.splitlines() == [
        "art: plugin acme (art-acme): active: inference engine acme, art_log_metrics, art_register_commands,"
        " art_register_inference_engines",
        "art: plugin broken (art-broken): broken: it could not be imported: ModuleNotFoundError: No module named"
        " 'a_library_that_is_gone'",
        "art: art_log_metrics(model, metrics, step, split) → acme",
        "art: art_resolve_base_model(name) → nobody",
    ]
    assert plugin_site.python("-W", "ignore", "-c", script).stderr == ""


TALKATIVE = """
    import os, subprocess, sys

    print("imported, and glad of it")
    os.write(1, b"said by a library in C\\n")
    subprocess.run([sys.executable, "-c", "print('said by a program')"], check=True)
""" + ACME.replace(
    "def acme():",
    "def acme(): ...\n        print('registering commands')\n\n        @cli.command('other')\n        def other():",
)


@pytest.mark.slow
def test_what_a_plugin_prints_while_it_is_loaded_is_no_part_of_the_answer(plugin_site: Any) -> None:
    plugin_site.install("art-acme", TALKATIVE)
    listed = plugin_site.art("plugins", "--json")
    assert [row["name"] for row in json.loads(listed.stdout)] == ["acme"]
    assert listed.stderr.splitlines() == [
        "imported, and glad of it",
        "said by a library in C",
        "said by a program",
        "registering commands",
    ]
    assert plugin_site.art("plugins", "check").stdout == "1 of 1 plugins are active.\n"
    assert plugin_site.art("other").stdout == "acme's own command\n"


def test_importing_loads_no_plugin_and_the_first_use_warns_once(plugin_site: Any) -> None:
    plugin_site.install("art-broken", "import a_library_that_is_gone", plugin="broken")
    script = """
import art_core
print("imported")
for _ in range(3):
    art_core.installed_plugins()
"""
    ran = plugin_site.python("-c", script)
    assert ran.returncode == 0
    assert ran.stdout == "imported\n"
    assert ran.stderr.count("plugin 'broken' of art-broken is broken and left out") == 1


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    package = tmp_path / "foreign" / "art"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def text2art(text):\n    return text\n")
    return package


def test_a_foreign_art_in_front_of_ours_is_noticed(plugin_site: Any, foreign: Path) -> None:
    (plugin_site.folder / "art").symlink_to(foreign)
    checked = plugin_site.python("-m", "art_core", "plugins", "check")
    assert checked.returncode == 1
    assert "`import art` gives a foreign package at" in checked.stderr
    assert "pip install --force-reinstall --no-deps art-core" in checked.stderr


def test_a_foreign_art_installed_over_ours_is_noticed(plugin_site: Any, foreign: Path) -> None:
    ours = Path(__file__).parents[2] / "art"
    for file in ours.glob("*.py"):
        if file.name != "__init__.py":
            (foreign / file.name).write_text(file.read_text())
    (plugin_site.folder / "art").symlink_to(foreign)
    checked = plugin_site.python("-m", "art_core", "plugins", "check")
    assert checked.returncode == 1
    assert "gives a foreign package" in checked.stderr
